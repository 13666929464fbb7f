"""NSA's kernels by Triton's interpreter on a CPU, in fp32 and small; which backend runs; what is refused.

test_nsa_gpu.py has the rest, where there is a GPU.
"""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import library
from torch.utils.checkpoint import checkpoint

from configs.errors import ConfigError
from configs.schema import Attention, Backend, Branch, Compression
from nsa import Documents, NSACore, fused, hopper_picked, nsa_attention, picked, reference, score, tiles, visits
from nsa.cases import CASES, Case, make_inputs
from parallel.rope import Rope
from tests import kernels, tiny
from tests.test_nsa_visits import seen_by_visit

interpreted = pytest.mark.skipif(not fused.INTERPRETED, reason="the interpreter is off where there is a GPU")
CPU = torch.device("cpu")
SIZES = Attention(l=8, d=4, l_slc=16, n=3, w=12)
SMALL = Case("small", (50, 9), heads=2, kv_heads=1, sizes=SIZES)
HOSTILE = ("one token", "exactly a block", "empty document", "window of one", "much overlap", "one KV head")
HOSTILE += ("no block to score by", "one query a tile", "blocks of one token")


@interpreted
@pytest.mark.parametrize("case", [c for c in CASES if c.name in HOSTILE], ids=lambda c: c.name)
def test_forward_backward_and_selection(case):
    assert kernels.faults(case, torch.float32, "cpu") == []


def check_causal(device: str, dtype: torch.dtype, case: Case, changed: int) -> None:
    """Token `changed` of the first document, and all after it, do not touch what comes before: bit for bit."""
    x, a = {name: t.detach() for name, t in make_inputs(case, dtype, device).items()}, case.sizes
    before = kernels.attend(case, x)
    _, first, _ = reference.block_starts(case.cu_seqlens, a.l, a.d)
    for name, t in x.items():
        later = first + a.l > changed if name.endswith("cmp") else torch.arange(case.tokens) >= changed
        t[later.to(device)] = torch.randn_like(t[later.to(device)]) * 3
    after = kernels.attend(case, x)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed:], after[changed:])


@interpreted
def test_no_output_depends_on_later_tokens():
    check_causal("cpu", torch.float32, SMALL, 33)


@interpreted
def test_packed_documents_equal_documents_alone():
    x = {name: t.detach() for name, t in make_inputs(SMALL, torch.float32).items()}
    packed, token, block = kernels.attend(SMALL, x), 0, 0
    for length in SMALL.lengths:
        alone = replace(SMALL, lengths=(length,))
        rows, blocks = slice(token, token + length), slice(block, block + alone.blocks)
        part = {name: t[blocks if name.endswith("cmp") else rows] for name, t in x.items()}
        torch.testing.assert_close(kernels.attend(alone, part), packed[rows], rtol=1e-6, atol=1e-6)
        token, block = token + length, block + alone.blocks


def check_ties(device: str, dtype: torch.dtype, case: Case) -> None:
    """Blocks that score alike are taken from the first on."""
    x = make_inputs(case, dtype, device)
    x["k_cmp"] = torch.zeros_like(x["k_cmp"])
    read, a = kernels.selection(case, x), case.sizes
    for t in range(case.tokens):
        own = t // a.l_slc
        free = [j for j in range(own) if j not in range(a.initial)][: max(0, a.n - 1 - a.initial)]
        expected = sorted({*range(min(a.initial, own + 1)), own, *free})
        for head in read[t]:
            assert head.nonzero().flatten().tolist() == expected, f"query {t}"


@interpreted
def test_ties_go_to_the_smaller_block():
    sizes = Attention(l=4, d=4, l_slc=8, n=3, initial=1, local=1, w=4)
    check_ties("cpu", torch.float32, Case("ties", (60,), heads=2, kv_heads=1, sizes=sizes))


def core_results(device: str, dtype: torch.dtype, sizes: Attention, width: int, backend: Backend) -> dict:
    """Output and all gradients of a core with weights of its own."""
    core = NSACore(replace(sizes, backend=backend), width, width).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    for p in core.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    documents = Documents.of(torch.tensor([0, 40, 45, 100]), device)
    shapes = {"q": (100, 4, width), "gates": (100, 4, len(sizes.branches))}
    shapes |= {f"{x}_{b.value}": (100, 2, width) for x in "kv" for b in sizes.branches}
    x = {name: torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for name, s in shapes.items()}
    kv = {b.value: (x[f"k_{b.value}"], x[f"v_{b.value}"]) for b in sizes.branches}
    o = core(x["q"], kv, x["gates"].sigmoid(), documents, Rope(width, 128, 1e4, torch.device(device)))
    x |= dict(core.named_parameters())
    return {"o": o.detach(), **dict(zip(x, torch.autograd.grad(o.sin().sum(), list(x.values()))))}


@interpreted
@pytest.mark.parametrize("changes", [{}, {"branches": [Branch.slc], "compression": Compression.mean}], ids=str)
def test_a_core_computes_alike_by_kernels_and_by_torch(changes):
    ours, plain = (
        core_results("cpu", torch.float32, replace(SIZES, **changes), 8, backend)
        for backend in (Backend.triton, Backend.torch)
    )
    assert ours.keys() == plain.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], plain[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@interpreted
def test_compiled_whole_and_computed_again_it_is_the_same():
    case = Case("few", (21,), heads=2, kv_heads=1, sizes=SIZES)
    x = make_inputs(case, torch.float32)
    do = torch.ones(case.tokens, case.heads, case.v_dim)
    plain = kernels.results(case, x, do)

    def attend(*values):
        return kernels.attend(case, dict(zip(x, values)))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for f in (compiled, *(partial(checkpoint, attend, use_reentrant=reentrant) for reentrant in (True, False))):
        y = kernels.leaves(x, torch.float32)
        o = f(*y.values())
        o.backward(do)
        assert torch.equal(o, plain["o"])
        for name, t in y.items():
            assert torch.equal(t.grad, plain[name]), name


@interpreted
def test_the_operators_keep_the_rules_of_torch(monkeypatch):
    case, calls = Case("few", (9, 2), heads=2, kv_heads=1, sizes=SIZES), []

    def noted(op, *args):
        calls.append((op, args))
        return op(*args)

    for name in ("_nsa", "_nsa_backward"):
        monkeypatch.setattr(fused, name, partial(noted, getattr(fused, name)))
    kernels.results(case, make_inputs(case, torch.float32), torch.ones(11, 2, 8))
    (forward, inputs), (backward, others) = calls
    library.opcheck(forward, inputs)
    library.opcheck(backward, others, test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_only_asked_for_do_kernels_run_on_a_cpu(monkeypatch):
    x = make_inputs(SMALL, torch.float32)
    monkeypatch.setattr(fused, "nsa", lambda *_: "kernels")
    assert kernels.attend(SMALL, x, Backend.triton) == "kernels"
    plain = kernels.attend(SMALL, x, Backend.torch)
    assert torch.equal(kernels.attend(SMALL, x, Backend.auto), plain)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v_dim": 6}, "the value width is 6; they take 16, 32"),
        ({"qk_dim": 7}, "the query and key width is 7; they take"),
        ({"heads": 6}, "6 heads share a KV head; they take groups of 1, 2, 4"),
        ({"sizes": replace(SIZES, l_slc=24)}, "l_slc is 24; they take 16, 32, 64"),
        ({"sizes": replace(SIZES, n=80)}, "n is 80 with local=2; they take at most 66"),
    ],
)
@interpreted
def test_what_the_kernels_do_not_take_is_named(changes, reason):
    case = replace(SMALL, **changes)
    with pytest.raises(ValueError, match=reason):
        kernels.attend(case, make_inputs(case, torch.float32))


@interpreted
@pytest.mark.parametrize("blocks", [82, 242, 402])
@pytest.mark.parametrize(("n", "initial"), [(16, 1), (66, 0)])
def test_the_best_of_many_blocks_are_chosen(blocks, n, initial):
    """Of the last tile of queries, with many equal scores: of those the smaller block. Runs of blocks are compared
    first: of 242 runs of four, of 402 of eight."""
    a = Attention(l=4, d=4, l_slc=4, n=n, initial=initial, local=2, w=4)
    documents = kernels.packed(Case("long", (4 * blocks,), sizes=a))
    tile = (4 * blocks - 1) // 64
    scores = torch.randint(0, 40, (1, 1, 64, -(-blocks // 16) * 16), generator=torch.Generator().manual_seed(0)).float()
    keys = torch.full((4 * blocks, 1, n - 2), -1, dtype=torch.int32)
    score._launch_choose(scores, keys, documents, a, tile)
    for t in range(64 * tile, 4 * blocks):
        found = scores[0, 0, t % 64, initial : t // 4 - 1]
        best = found.sort(descending=True, stable=True).indices[: n - 2 - initial] + initial
        assert keys[t, 0].tolist() == [*range(initial), *best.tolist()]


@interpreted
def test_visits_are_merged_as_pairs_are(monkeypatch):
    """Their kernel gets whole rows, made once: in a run values lie among those of other branches, and a copy for each
    chunk would be all of them again."""
    case = replace(SMALL, sizes=replace(SIZES, n=5, local=1, initial=1, l_slc=8), lengths=(50, 9))
    x, a, kept, seen = make_inputs(case, torch.float32), case.sizes, [], []
    among = torch.stack([x["v_slc"]] * 2, 2)[:, :, 1]
    assert not among.is_contiguous()
    kv = {"slc": (x["k_slc"], among), "win": (x["k_win"], x["v_win"])}
    gather = visits.gather

    def run() -> torch.Tensor:
        return fused.nsa(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], case.cu_seqlens, a).detach()

    def attend(q, k, v, found, documents, slc, o, lse, chunk):
        seen.append([t.data_ptr() for t in (q, k, v)])
        assert all(t.is_contiguous() for t in (q, k, v))
        o.fill_(float("nan")), lse.fill_(float("nan"))
        of_visits = seen_by_visit(case, kept[0], documents, visits.span(chunk, documents, slc))
        for (t, group, place), blocks in of_visits.items():
            if t // 16 == chunk:
                tokens, at = torch.cat([torch.arange(b, b + slc) for b in blocks]), (t % 16, group, place)
                s = q[t].unflatten(0, (case.kv_heads, -1))[group] @ k[tokens, group].T * q.shape[2] ** -0.5
                o[at], lse[at] = s.softmax(1) @ v[tokens, group], s.logsumexp(1) * tiles.LOG2E

    for module in (picked, visits):
        monkeypatch.setattr(module, "CHUNK", 16)
    expected = run()
    monkeypatch.setattr(visits, "SPANS", 3)  # of two blocks in the last chunks
    monkeypatch.setattr(visits, "gather", lambda chosen, *args: (kept.append(chosen), gather(chosen, *args))[1])
    monkeypatch.setattr(hopper_picked, "fits", lambda *_: True)
    monkeypatch.setattr(hopper_picked, "attend", attend)
    torch.testing.assert_close(run(), expected, rtol=1e-5, atol=1e-6)
    assert len(seen) > 1
    assert all(one == seen[0] for one in seen)


@interpreted
@pytest.mark.parametrize("changes", [{"qk_dim": 128}, {"v_dim": 128}], ids=str)
def test_large_blocks_of_wide_fp32_heads_are_too_much_for_shared_memory(changes):
    case = replace(SMALL, sizes=replace(SIZES, l_slc=128), **changes)
    with pytest.raises(ValueError, match=r"l_slc is 128; with heads wider than 64 in float32 they take at most 64"):
        kernels.attend(case, make_inputs(case, torch.float32))


@interpreted
def test_the_kernels_take_no_fp64():
    with pytest.raises(ValueError, match=r"q is torch.float64; they take bfloat16"):
        kernels.attend(SMALL, make_inputs(SMALL, torch.float64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_is_refused_before_a_run_starts(monkeypatch):
    from parallel import attention

    monkeypatch.setattr(fused, "INTERPRETED", False)
    cfg = tiny.config(attention__backend=Backend.triton, model__qk_dim=16, model__v_dim=16)
    with pytest.raises(ConfigError, match=r"attention.backend=triton: the kernels need a GPU"):
        attention.build(cfg, None, None)
    with pytest.raises(ValueError, match=r"q is on the cpu, and they run on a GPU"):
        kernels.attend(SMALL, make_inputs(SMALL, torch.float32))


def test_without_triton_there_is_the_definition():
    code = """
import sys
sys.modules["triton"] = None
import nsa
from configs.schema import Attention, Backend
nsa.check_backend(Attention())
try:
    nsa.check_backend(Attention(backend=Backend.triton))
except Exception as e:
    print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "error: config attention.backend=triton: triton is not installed; give torch or auto\n"


BAD = [
    ("k_slc", lambda t: t.double(), r"k_slc is torch.float64 on cpu; it must be torch.float32 on cpu as q is"),
    ("gates", lambda t: t.half(), r"gates is torch.float16 on cpu; it must be torch.float32"),
    ("gates", lambda t: t[..., :2], r"gates has the shape \(59, 2, 2\); .* it must be \(59, 2, 3\)"),
    ("q", lambda t: t.long(), r"q is torch.int64 of shape"),
    ("q", lambda t: t[0], r"q is torch.float32 of shape \(2, 8\)"),
    ("k_win", lambda t: t[:-1], r"k_win has the shape \(58, 1, 8\); .* it must be \(59, 1, 8\)"),
    ("v_slc", lambda t: t[..., :4], r"v_slc has the shape \(59, 1, 4\); .* it must be \(59, 1, 8\)"),
    ("k_cmp", lambda t: t.repeat(1, 2, 1), r"v_cmp has the shape .* it must be"),
    ("k_slc", lambda t: t[:, 0], r"k_slc has the shape \(59, 8\); it must have three dimensions"),
    ("k_slc", lambda t: None, r"k_slc is missing; the branches \['cmp', 'slc', 'win'\] need it"),
    ("k_cmp", lambda t: None, r"k_cmp is missing"),
    (
        "q",
        lambda t: t[:0],
        r"q is torch.float32 of shape \(0, 2, 8\); it must be \[tokens, heads, width\], none of them 0",
    ),
    ("q", lambda t: t[:, :0], r"q is torch.float32 of shape \(59, 0, 8\)"),
    ("q", lambda t: t.to(torch.float8_e4m3fn), r"q is torch.float8_e4m3fn of shape .* 16, 32 or 64 bit"),
    ("q", lambda t: t.to("meta"), r"gates is torch.float32 on cpu; it must be torch.float32 on meta as q is"),
    ("q", lambda t: t[:, :1].expand(-1, 3, -1), r"gates has the shape .* it must be \(59, 3, 3\)"),
    ("k_slc", lambda t: t.expand(-1, 2, -1), r"k_slc has the shape \(59, 2, 8\); .* it must be \(59, 1, 8\)"),
    ("k_cmp", lambda t: t[:, :0], r"q has 2 heads; it must have a multiple of the 0 KV heads"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{name} {i}" for i, (name, *_) in enumerate(BAD)])
def test_what_does_not_fit_is_named(name, change, message):
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        kernels.attend(SMALL, {**x, name: change(x[name])}, Backend.torch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 2}, r"attention.n=2: smaller than the forced blocks .*; give at least 3"),
        ({"local": 0}, r"attention.local=0: out of range; give at least 1"),
        ({"initial": -1}, r"attention.initial=-1: out of range; give at least 0"),
        ({"w": 0}, r"attention.w=0: out of range"),
        ({"d": 3}, r"attention.l=8: not divisible by the stride attention.d=3"),
        ({"l": 32}, r"attention.l=32: larger than attention.l_slc=16"),
        ({"branches": []}, r"attention.branches=\[\]: no branch left"),
    ],
    ids=str,
)
def test_sizes_that_kernels_would_read_or_write_out_of_bounds_with_are_refused(changes, message):
    case = replace(SMALL, sizes=replace(SIZES, **changes))
    with pytest.raises(ValueError, match=message):
        kernels.attend(case, make_inputs(SMALL, torch.float32), Backend.torch)


def test_starts_that_are_not_of_these_documents_are_refused():
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}
    starts = Documents.of(torch.tensor([0, 20, 40, 59]), CPU).blocks(8, 4).starts
    with pytest.raises(ValueError, match=r"starts is \(\(2, 4\), torch.int32, .*; it must be \(\(2, 3\), torch.int32"):
        nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], SMALL.cu_seqlens, SIZES, starts)


@pytest.mark.parametrize("cu_seqlens", [[], [0], [[0, 5]], [0.0, 5.0], [False, True], [3, 5], [0, 5, 3]], ids=str)
def test_no_documents_are_made_of_what_is_none(cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens is .* must run from 0 to the number of tokens in whole numbers"):
        Documents.of(torch.tensor(cu_seqlens), CPU)


@pytest.mark.parametrize("backend", [Backend.torch, pytest.param(Backend.triton, marks=interpreted)])
@pytest.mark.parametrize("cu_seqlens", [[0, 50, 60], [1, 59], [0, 60, 59], [59], [], [[0, 59]], [0.0, 59.0]], ids=str)
def test_documents_that_are_none_are_refused(cu_seqlens, backend):
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}
    sizes = replace(SIZES, backend=backend)
    with pytest.raises(ValueError, match=r"cu_seqlens is .* it must run from 0 to 59"):
        nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], torch.tensor(cu_seqlens), sizes)


@pytest.mark.parametrize("backend", [Backend.torch, pytest.param(Backend.triton, marks=interpreted)])
def test_compressed_keys_of_other_documents_are_refused(backend):
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    fewer = {**x, "k_cmp": x["k_cmp"][:-1], "v_cmp": x["v_cmp"][:-1]}
    with pytest.raises(ValueError, match=r"k_cmp is \(11, 1, 8\); it must hold the 12 compression blocks"):
        kernels.attend(SMALL, fewer, backend)


def test_one_table_of_blocks_serves_all_layers():
    documents = Documents.of(torch.tensor([0, 50, 59]), CPU)
    blocks = documents.blocks(8, 4)
    assert documents.blocks(8, 4) is blocks
    assert blocks.first.tolist() == reference.block_starts(documents.cu_seqlens, 8, 4)[1].tolist()
    assert blocks.starts.tolist() == [[0, 50, 59], [0, 11, 12]]
    assert documents.positions.tolist() == [*range(50), *range(9)]
