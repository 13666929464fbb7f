"""NSA's kernels by Triton's interpreter on a CPU, in fp32 and small.

test_nsa_gpu.py has the rest, where there is a GPU; test_nsa_attention.py what is refused.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import library
from torch.utils.checkpoint import checkpoint

from configs.schema import Attention, Backend, Branch, Compression
from nsa import Documents, NSACore, fused, hopper_picked, picked, reference, score, tiles, visits
from nsa.cases import CASES, Case, make_inputs
from parallel.rope import Rope
from tests import kernels
from tests.kernels import SIZES, SMALL, interpreted
from tests.test_nsa_visits import seen_by_visit

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
