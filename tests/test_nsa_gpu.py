"""NSA's kernels on a GPU: every precision, width, group and option value, and what only shows at full size."""

import multiprocessing
import os
import traceback
import warnings
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from configs.schema import Attention, Backend, Branch, Compression
from nsa import (
    Documents,
    NSACore,
    band,
    fused,
    hopper_band,
    hopper_picked,
    hopper_picked_backward,
    nsa_attention,
    picked,
    reference,
    visits,
)
from nsa.cases import ABLATIONS, CASES, LARGE, WHOLE, Case, fitted, make_inputs
from nsa.memory import everything
from parallel.rope import Rope
from tests import kernels, ranks, tiny
from tests.test_nsa_compress import check_block_linear, check_compress
from tests.test_nsa_kernels import check_causal, check_ties, core_results
from tests.test_parity import train

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LONG = Case("two rounds of scores", (6001, 2500), 2, 1, 128, 128, Attention())
JOBS = [
    (LONG, BF16),
    *((case, BF16) for case in WHOLE),
    *((case, FP32) for case in WHOLE[::2]),
    *((case, FP16) for case in WHOLE[2::5]),
    *((case, BF16) for case in ABLATIONS + LARGE),
    (LARGE[0], FP16),
    *((fitted(case), BF16) for case in CASES),
    *((fitted(case), FP32) for case in CASES[::2]),
]


def title(job: tuple[Case, torch.dtype]) -> str:
    return f"{job[0].name}, {str(job[1]).removeprefix('torch.')}"


def attempt(job: tuple[Case, torch.dtype]) -> list[str]:
    """Its faults; a failure to compile is one."""
    try:
        return kernels.faults(*job, "cuda")
    except Exception:
        return [traceback.format_exc()]


@pytest.fixture(scope="module")
def found(request):
    """The faults of all chosen jobs, by processes side by side: most of the time goes into compiling."""
    jobs = [i.callspec.params["job"] for i in request.session.items if getattr(i, "originalname", "") == "test_case"]
    with multiprocessing.get_context("spawn").Pool(min(len(jobs), os.cpu_count() - 1, 14)) as pool:
        return dict(zip(map(title, jobs), pool.map(attempt, jobs, chunksize=1)))


@pytest.mark.parametrize("job", JOBS, ids=title)
def test_case(job, found):
    assert found[title(job)] == []


@pytest.mark.parametrize(
    ("dtype", "heads", "width", "hidden", "l", "d"),
    [
        (BF16, 4, 128, 128, 32, 16),
        (BF16, 4, 192, 192, 32, 16),
        (BF16, 8, 64, 24, 64, 16),
        (FP16, 1, 64, 64, 32, 32),
        (FP32, 3, 64, 40, 16, 8),
    ],
)
def test_the_first_layer_of_compression(dtype, heads, width, hidden, l, d):
    check_block_linear("cuda", dtype, heads, width, hidden, l, d)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(
    ("widths", "hidden"),
    [((64, 64), (64, 64)), ((128, 128), (128, 128)), ((192, 128), (192, 128)), ((96, 64), (24, 5))],
    ids=str,
)
def test_compression_of_keys_and_values_at_once(dtype, widths, hidden):
    check_compress("cuda", dtype, 6, widths, hidden, 32, 16)


@pytest.mark.parametrize("compression", list(Compression))
def test_a_core_computes_alike_by_kernels_and_by_torch(compression):
    sizes = Attention(l=8, d=4, l_slc=16, n=3, w=12, compression=compression)
    ours, plain = (core_results("cuda", FP32, sizes, 16, backend) for backend in (Backend.auto, Backend.torch))
    assert ours.keys() == plain.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], plain[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_ties_go_to_the_smaller_block():
    sizes = Attention(l=16, d=16, l_slc=32, n=3, initial=1, local=1, w=16)
    check_ties("cuda", BF16, Case("ties", (300,), 4, 1, 16, 16, sizes))


CHOSEN = [WHOLE[4], WHOLE[9], WHOLE[14], *LARGE[:3]]


def by_chunks(case, chunk, step, module, monkeypatch):
    """Inputs, the keys and values among them, and a list that grows: whose `step` takes a chunk of so many tokens."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an H100 or H200")
    for each in (picked, visits, hopper_picked):
        monkeypatch.setattr(each, "CHUNK", chunk)
    calls = []
    for each in (module, picked):
        works = getattr(each, step)
        monkeypatch.setattr(each, step, lambda *args, works=works: (calls.append(works.__module__), works(*args)))
    x = make_inputs(case, BF16, "cuda")
    return x, {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}, calls


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
@pytest.mark.parametrize(("spans", "chunk"), [(visits.SPANS, picked.CHUNK), (2, 512)])
def test_chosen_blocks_by_the_copy_engine_are_the_same(case, spans, chunk, monkeypatch):
    """But for where sums are rounded: to a bit or two. And twice to the bit, whichever program took a tile."""
    x, kv, calls = by_chunks(case, chunk, "attend", hopper_picked, monkeypatch)
    monkeypatch.setattr(visits, "SPANS", spans)

    def attend():
        torch.empty(2**28, device="cuda").fill_(float("nan"))  # what partial outputs are put into
        return fused.nsa(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], case.cu_seqlens, case.sizes).detach()

    ours, again = attend(), attend()
    monkeypatch.setattr(hopper_picked, "fits", lambda *_: False)
    plain = attend()
    chunks = -(-case.tokens // chunk)
    assert calls == ["nsa.hopper_picked"] * 2 * chunks + ["nsa.picked"] * chunks
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours, plain, rtol=0.016, atol=5e-3)


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
@pytest.mark.parametrize("chunk", [picked.CHUNK, 512])
def test_gradients_of_chosen_blocks_by_the_copy_engine_are_the_same(case, chunk, monkeypatch):
    """As above."""
    x, kv, calls = by_chunks(case, chunk, "differentiate", hopper_picked_backward, monkeypatch)
    o = fused.nsa(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], case.cu_seqlens, case.sizes)
    do = torch.randn_like(o)

    def gradients():
        torch.empty(2**28, device="cuda").fill_(float("nan"))  # what parts are put into
        return torch.autograd.grad(o, list(x.values()), do, retain_graph=True)

    ours, again = gradients(), gradients()
    monkeypatch.setattr(hopper_picked, "fits", lambda *_: False)
    chunks = -(-case.tokens // chunk)
    for name, one, other, plain in zip(x, ours, again, gradients()):
        assert torch.equal(one, other), name
        torch.testing.assert_close(one, plain, rtol=0.016, atol=5e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert calls == ["nsa.hopper_picked_backward"] * 2 * chunks + ["nsa.picked"] * chunks


BANDS = [
    *(
        Case(f"{width}, {heads} heads", (700, 1, 3, 40, 1500, 13), heads, groups, width, min(width, 128), Attention())
        for width, heads, groups in ((64, 16, 2), (128, 64, 4), (192, 64, 1), (64, 64, 2))
    ),
    Case("other options", (31, 1, 2100), 32, 2, 128, 128, Attention(l=16, d=8, l_slc=32, w=100, local=1, initial=2)),
    Case("short of a block", (20, 31), 16, 1, 64, 64, Attention()),
]


@pytest.mark.parametrize("case", BANDS, ids=lambda case: case.name)
@pytest.mark.parametrize("names", [["cmp", "slc", "win"], ["slc"], ["cmp", "win"]], ids=str)
def test_bands_by_the_copy_engine_are_the_same(case, names, monkeypatch):
    """To a bit or two: where tiles begin, and with them where sums are rounded, differs. And twice to the bit."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs an H100 or H200")
    x, sizes, worked = make_inputs(case, BF16, "cuda"), case.sizes, []
    x = {name: t.detach() for name, t in x.items()}
    cut = kernels.packed(case, "cuda")
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in names}
    works = hopper_band.forward
    monkeypatch.setattr(hopper_band, "forward", lambda *args: (worked.append(len(args[1])), works(*args)))
    torch.empty(2**28, device="cuda").fill_(float("nan"))  # what outputs are put into
    ours, again = band.forward(x["q"], kv, cut, sizes), band.forward(x["q"], kv, cut, sizes)
    assert worked == [sum(len(k) > 0 for k, _ in kv.values())] * 2
    monkeypatch.setattr(hopper_band, "fits", lambda *_: False)
    for name, pair in band.forward(x["q"], kv, cut, sizes).items():
        assert all(map(torch.equal, ours[name], again[name])), name
        torch.testing.assert_close(ours[name], pair, rtol=0.016, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_no_output_depends_on_later_tokens():
    check_causal("cuda", BF16, Case("causal", (1701, 90), 32, 2, 64, 64, Attention()), 1333)


def test_a_gpu_takes_the_kernels_unless_told_not_to(monkeypatch):
    case = fitted(CASES[0])
    x = make_inputs(case, FP32, "cuda")
    monkeypatch.setattr(fused, "nsa", lambda *_: "kernels")
    assert kernels.attend(case, x, Backend.auto) == "kernels"
    assert kernels.attend(case, x, Backend.torch) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.attend(case, make_inputs(case, torch.float64, "cuda"), Backend.auto)
    odd = replace(case, v_dim=24)
    with pytest.warns(UserWarning, match=r"NSA runs without its kernels.* the value width is 24"):
        kernels.attend(odd, make_inputs(odd, FP32, "cuda"), Backend.auto)


EVERYDAY = Case("everyday", (1700, 1, 323), 16, 1, 64, 64, Attention())  # long enough to choose blocks
assert EVERYDAY.lengths[0] > everything(EVERYDAY.sizes)


def test_compiled_whole_it_is_the_same():
    x = make_inputs(EVERYDAY, BF16, "cuda")
    do = torch.randn(EVERYDAY.tokens, EVERYDAY.heads, EVERYDAY.v_dim, device="cuda", dtype=BF16)
    plain = kernels.results(EVERYDAY, x, do)

    def attend(*values):
        return kernels.attend(EVERYDAY, dict(zip(x, values)))

    compiled = torch.compile(attend, fullgraph=True)
    for f in (compiled, lambda *values: checkpoint(attend, *values, use_reentrant=False)):
        o = f(*x.values())
        assert torch.equal(o, plain["o"])
        for name, g in zip(x, torch.autograd.grad(o, list(x.values()), do)):
            assert torch.equal(g, plain[name]), name


def test_the_host_never_waits():
    core = NSACore(Attention(), 64, 64).to("cuda", BF16)
    for p in core.parameters():
        torch.nn.init.normal_(p, std=0.02)
    rope = Rope(64, 2048, 1e4, torch.device("cuda"))
    n, heads = EVERYDAY.tokens, EVERYDAY.heads

    def step():
        documents = Documents.of(EVERYDAY.cu_seqlens, torch.device("cuda"))
        make = {"dtype": BF16, "device": "cuda", "requires_grad": True}
        q, gates = torch.randn(n, heads, 64, **make), torch.rand(n, heads, 3, **make)
        kv = {b.value: (torch.randn(n, 1, 64, **make), torch.randn(n, 1, 64, **make)) for b in Branch}
        core(q, kv, gates, documents, rope).sum().backward()

    step()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def large(tokens: int, a: Attention) -> tuple[dict, torch.Tensor]:
    """Inputs of 64 heads of 128 to 4 KV heads, made on the GPU."""
    torch.manual_seed(0)
    m = (tokens - a.l) // a.d + 1
    shapes = {"q": (tokens, 64, 128), "gates": (tokens, 64, 3)}
    for name, rows in (("cmp", m), ("slc", tokens), ("win", tokens)):
        shapes |= {f"k_{name}": (rows, 4, 128), f"v_{name}": (rows, 4, 128)}
    x = {name: torch.randn(size, dtype=BF16, device="cuda") for name, size in shapes.items()}
    x["gates"].sigmoid_()
    return {name: t.requires_grad_() for name, t in x.items()}, torch.tensor([0, tokens])


def attend_large(x: dict, cu_seqlens: torch.Tensor, a: Attention) -> torch.Tensor:
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}
    return nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], cu_seqlens, a)


def test_memory_at_65536_tokens():
    a = Attention(backend=Backend.triton)
    x, cu_seqlens = large(65536, a)
    do = torch.randn(65536, 64, 128, dtype=BF16, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = attend_large(x, cu_seqlens, a)
    gradients = torch.autograd.grad(o, list(x.values()), do)
    asked_for = sum(t.nbytes for t in (o, *gradients))
    used = (torch.cuda.max_memory_allocated() - before - asked_for) / 2**30
    assert used < 6, f"{used:.2f} GiB beside inputs, output and gradients"


def test_offsets_beyond_int32():
    """The last queries of a q with more than 2^31 elements, and all that they send back, against the definition."""
    a, tokens, few = Attention(backend=Backend.triton), 2**18 + 40, 16
    x, cu_seqlens = large(tokens, a)
    assert x["q"].numel() > 2**31
    o = attend_large(x, cu_seqlens, a)
    do = torch.zeros_like(o)
    do[-few:] = torch.randn_like(do[-few:])
    ours = dict(zip(x, torch.autograd.grad(o, list(x.values()), do)))
    assert not any(ours[name][:-few].any() for name in ("q", "gates"))
    ours |= {"o": o[-few:].detach(), "q": ours["q"][-few:].clone(), "gates": ours["gates"][-few:]}
    part = do[-few:].float()
    del o, do
    y = {n: (t.detach()[-few:] if n in ("q", "gates") else t.detach()).float().requires_grad_() for n, t in x.items()}
    del x
    kv = {name: (y[f"k_{name}"], y[f"v_{name}"]) for name in ("slc", "win")}
    o = reference._chunk(y["q"], kv, y["k_cmp"], y["v_cmp"], y["gates"], tokens - few, a)
    exact = {"o": o.detach(), **dict(zip(y, torch.autograd.grad(o, list(y.values()), part)))}
    for name, expected in exact.items():
        error = (ours[name].float() - expected).norm() / expected.norm()
        assert error < 0.03, f"{name}: {error:.1e}"  # bf16 leaves 0.005; one query with another block adds 0.01


def test_a_model_trains_alike(corpus):
    cfg = tiny.config(data__path=corpus, model__qk_dim=16, model__v_dim=16)
    ours, plain = (
        ranks.run(1, train, tiny.change(cfg, attention__backend=backend), timeout=300)[0]
        for backend in (Backend.triton, Backend.torch)
    )
    for step, (a, b) in enumerate(zip(ours, plain)):
        assert a == pytest.approx(b, rel=1e-3), f"step {step}"
