"""The kernels for sm_90 on a CPU, by tests/gluon.py: against those for any GPU, by Triton's interpreter in fp32.

test_nsa_gpu.py compares both where there is such a GPU, test_machine_code.py has what becomes of them there.
"""

import itertools

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

import tests.gluon
from configs.schema import Attention
from nsa import Documents, band, fused, hopper_band, hopper_picked, picked, tiles
from nsa.cases import Case, make_inputs
from nsa.pairs import sort
from nsa.score import NONE
from tests.gluon import Emulated

pytestmark = pytest.mark.skipif(not fused.INTERPRETED, reason="the interpreter is off where there is a GPU")

SMALL = Attention(l=16, d=8, l_slc=16, n=3, local=1, w=30)
OTHER = Attention(l=16, d=16, l_slc=32, n=3, initial=2, local=1, w=1)
BANDS = [
    Case("shorter than a block", (20, 31), 16, 1, 64, 64, Attention()),
    Case("packed", (150, 1, 40), 16, 1, 64, 64, SMALL),
    Case("groups of 64, keys of 192", (70, 9), 64, 1, 192, 128, Attention(l_slc=32, n=2, local=1, w=64)),
    Case("groups of 8, two KV heads", (130,), 16, 2, 64, 64, OTHER),
]


def inputs(case: Case) -> tuple[dict[str, torch.Tensor], tiles.Documents]:
    x = {name: t.detach() for name, t in make_inputs(case, torch.bfloat16).items()}
    blocks = Documents.of(case.cu_seqlens, x["q"].device).blocks(case.sizes.l, case.sizes.d)
    return x, tiles.Documents.of(case.cu_seqlens, blocks.starts)


@pytest.mark.parametrize("case", BANDS, ids=lambda case: case.name)
@pytest.mark.parametrize("names", [["cmp", "slc", "win"], ["slc"]], ids=str)
def test_bands(case, names, monkeypatch):
    x, documents = inputs(case)
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in names}
    exact = {name: (k.float(), v.float()) for name, (k, v) in kv.items()}
    expected = band.forward(x["q"].float(), exact, documents, case.sizes)
    monkeypatch.setattr(hopper_band, "fits", lambda *_: True)
    monkeypatch.setattr(hopper_band, "_forward", Emulated(hopper_band._forward))
    monkeypatch.setattr(hopper_band, "_multiprocessors", lambda _: 2)
    for name, ours in band.forward(x["q"], kv, documents, case.sizes).items():
        for got, wanted in zip(ours, expected[name]):
            torch.testing.assert_close(got.float(), wanted, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize(("heads", "groups", "qk", "v"), [(16, 1, 64, 64), (64, 2, 192, 128)])
def test_chosen_blocks(heads, groups, qk, v, monkeypatch):
    """Queries choose any number of blocks; no pair is left out, and none of the first block, which others attend to."""
    case = Case("chosen", (300, 1, 100), heads, groups, qk, v, Attention(n=5, local=1, initial=1))
    x, documents = inputs(case)
    n, g, picks, blocks = case.tokens, heads // groups, 4, documents.tiles(64)
    chosen = torch.full((n, groups, picks), NONE, dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    for t, group in itertools.product(range(192, 300), range(groups)):
        count = int(torch.randint(1, picks + 1, (), generator=generator))
        others = 1 + torch.randperm(3, generator=generator)[: count - 1]  # of the first document, as block 0
        chosen[t, group, :count] = torch.tensor([0, *others]) + group * blocks
    pairs = sort(chosen, 8192, blocks)

    def attend(how, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        o = torch.full((n, groups, picks, g, v), float("nan"), dtype=dtype)
        lse = torch.full(o.shape[:-1], float("nan"))
        q, k, values = (x[name].to(dtype) for name in ("q", "k_slc", "v_slc"))
        how(q, k, values, o, lse, pairs, documents, case.sizes, 0)
        return o.float(), lse

    expected = attend(picked.attend, torch.float32)
    monkeypatch.setattr(hopper_picked, "_attend", Emulated(hopper_picked._attend))
    for got, wanted in zip(attend(hopper_picked.attend, torch.bfloat16), expected):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=5e-3, equal_nan=True)


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
    Emulated(_copied)[(1,)](*(hopper_picked.panels(t, 8) for t in (x, y)), bytes, parity, waits, sent)
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
