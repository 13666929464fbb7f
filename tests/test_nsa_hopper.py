"""The kernels for sm_90 on a CPU, by tests/gluon.py: against those for any GPU, by Triton's interpreter in fp32.

test_nsa_gpu.py compares both where there is such a GPU, test_machine_code.py has what becomes of them there.
"""

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

import tests.gluon
from configs.schema import Attention
from nsa import band, hopper_band, hopper_picked, hopper_picked_backward, picked, tiles, visits
from nsa.cases import Case, make_inputs
from nsa.hopper import boxes
from nsa.pairs import sort
from nsa.score import NONE
from tests.gluon import Emulated
from tests.kernels import interpreted, packed
from tests.test_nsa_visits import choices, seen_by_visit

pytestmark = interpreted

SMALL = Attention(l=16, d=8, l_slc=16, n=3, local=1, w=30)
OTHER = Attention(l=16, d=16, l_slc=32, n=3, initial=2, local=1, w=1)
BANDS = [
    Case("shorter than a block", (20, 31), 16, 1, 64, 64, Attention()),
    Case("packed", (150, 1, 40), 16, 1, 64, 64, SMALL),
    Case("groups of 64, keys of 192", (70, 9), 64, 1, 192, 128, Attention(l_slc=32, n=2, local=1, w=64)),
    Case("groups of 8, two KV heads", (130,), 16, 2, 64, 64, OTHER),
]


def inputs(case: Case) -> tuple[dict[str, torch.Tensor], tiles.Documents]:
    return {name: t.detach() for name, t in make_inputs(case, torch.bfloat16).items()}, packed(case)


@pytest.mark.parametrize("case", BANDS, ids=lambda case: case.name)
@pytest.mark.parametrize("names", [["cmp", "slc", "win"], ["slc"]], ids=str)
def test_bands(case, names, monkeypatch):
    x, documents = inputs(case)
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in names}
    exact = {name: (k.float(), v.float()) for name, (k, v) in kv.items()}
    expected = band.forward(x["q"].float(), exact, documents, case.sizes)
    monkeypatch.setattr(hopper_band, "fits", lambda *_: True)
    monkeypatch.setattr(hopper_band, "_forward", Emulated(hopper_band._forward))
    monkeypatch.setattr(hopper_band, "multiprocessors", lambda _: 2)
    for name, ours in band.forward(x["q"], kv, documents, case.sizes).items():
        for got, wanted in zip(ours, expected[name]):
            torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize(("heads", "groups", "qk", "v"), [(16, 1, 64, 64), (64, 2, 192, 128), (64, 1, 128, 128)])
def test_chosen_blocks(heads, groups, qk, v, monkeypatch):
    """Chunk by chunk, one of them without choices: a visit is attended to whole, and what has none is not touched."""
    case, chunk = Case("chosen", (500, 1, 200), heads, groups, qk, v, Attention(n=5, local=1, initial=1)), 256
    x, documents = inputs(case)
    chosen, n, g = choices(case, documents), case.tokens, heads // groups
    chosen[:chunk] = NONE
    q, k, values = (x[name] for name in ("q", "k_slc", "v_slc"))
    for module in (hopper_picked, visits):
        monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(visits, "SPANS", 2)  # so that visits of one span are of several blocks
    monkeypatch.setattr(hopper_picked, "_attend", Emulated(hopper_picked._attend))
    monkeypatch.setattr(hopper_picked, "multiprocessors", lambda _: 2)
    found, several = visits.gather(chosen, documents, 1, 64), 0
    for c in range(-(-n // chunk)):
        o = torch.full((chunk, groups, found.most, g, v), float("nan"), dtype=torch.bfloat16)
        lse = torch.full(o.shape[:-1], float("nan"))
        hopper_picked.attend(q, k, values, found, documents, 64, o, lse, c)
        for (t, group, place), blocks in seen_by_visit(case, chosen, documents, visits.span(c, documents, 64)).items():
            if t // chunk != c:
                continue
            tokens = torch.cat([torch.arange(b, b + 64) for b in blocks])
            s = q[t, group * g : (group + 1) * g].float() @ k[tokens, group].float().T * qk**-0.5
            at, expected = (t % chunk, group, place), s.softmax(1) @ values[tokens, group].float()
            torch.testing.assert_close(lse[at], s.logsumexp(1) * tiles.LOG2E, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(o[at].float(), expected, rtol=0.02, atol=5e-3)
            o[at] = lse[at] = float("nan")
            several += len(blocks) > 1
        assert o.isnan().all()
        assert lse.isnan().all()
    assert several > 50


@pytest.mark.parametrize(
    ("heads", "groups", "qk", "v", "uneven"),
    [(16, 1, 64, 64, False), (64, 2, 192, 128, False), (64, 1, 128, 128, True)],
)
def test_gradients_of_chosen_blocks(heads, groups, qk, v, uneven, monkeypatch):
    """Chunk by chunk: the parts of the kernel for any GPU, and what that one leaves untouched."""
    case, chunk, run = Case("chosen", (300, 1, 120), heads, groups, qk, v, Attention(n=5, local=1, initial=1)), 256, 48
    x, documents = inputs(case)
    chosen, n, g, blocks = choices(case, documents), case.tokens, heads // groups, documents.tiles(64)
    chosen[:chunk:3] = NONE
    q, k, values, do = x["q"], x["k_slc"], x["v_slc"], torch.randn(n, heads, v).bfloat16()
    shift, delta = torch.randn(groups, n + 3, g) + 8, torch.randn(groups, n + 3, g)
    monkeypatch.setattr(picked, "CHUNK", chunk)
    for module in (picked, hopper_picked_backward):
        monkeypatch.setattr(module, "BACK_RUN", run)
    monkeypatch.setattr(hopper_picked_backward, "_backward", Emulated(hopper_picked_backward._backward, uneven))
    monkeypatch.setattr(hopper_picked_backward, "multiprocessors", lambda _: 2)
    pairs, picks = sort(chosen, chunk, blocks), chosen.shape[2]
    slots = -(-chunk * picks // run) + blocks
    shapes = (chunk, groups, picks, g, qk), (groups, slots, 64, qk), (groups, slots, 64, v)
    for c in range(-(-n // chunk)):
        ours, expected = ([torch.full(shape, float("nan")) for shape in shapes] for _ in range(2))
        ours[0] = ours[0].bfloat16()
        exact = [t.float() for t in (q, k, values, do)]
        picked.differentiate(*exact, shift, delta, *expected, pairs, documents, c)
        hopper_picked_backward.differentiate(q, k, values, do, shift, delta, *ours, pairs, documents, c)
        for part, wanted in zip(ours, expected):
            assert not wanted.isnan().all()
            size = wanted.nan_to_num().abs().max().item()
            torch.testing.assert_close(part.float(), wanted, rtol=0.02, atol=0.01 * size, equal_nan=True)


@gluon.jit
def _copied(x, y, bytes, parity, WAITS: gl.constexpr, SENT: gl.constexpr):
    at = gl.allocate_shared_memory(x.dtype, [8, 64], gl.NVMMASharedLayout(128, 16, 2))
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    mbarrier.expect(ready, bytes)
    tma.async_copy_global_to_shared(x, [0, 0], ready, at)
    if WAITS:
        mbarrier.wait(ready, parity)
    tma.async_copy_shared_to_global(y, [0, 0], at)
    if SENT:
        tma.store_wait(0)


def copy(bytes: int = 1024, parity: int = 0, waits: bool = True, sent: bool = True) -> bool:
    """Whether a copy through shared memory is right; NaN where it was not waited for."""
    x, y = torch.randn(8, 64).bfloat16(), torch.zeros(8, 64).bfloat16()
    Emulated(_copied)[(1,)](*(boxes(t, 8)[0] for t in (x, y)), bytes, parity, waits, sent)
    assert torch.equal(x, y) or y.isnan().all()
    return torch.equal(x, y)


def test_faults_of_a_kernel_show(monkeypatch):
    monkeypatch.setattr(tests.gluon, "PATIENCE", 0.1)
    assert copy()
    assert not copy(waits=False)
    assert not copy(parity=1)
    with pytest.raises(AssertionError, match="stores that nobody waited for"):
        copy(sent=False)
    with pytest.raises(AssertionError, match="a wait that does not end"):
        copy(bytes=1026)
