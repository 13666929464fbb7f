"""The torch definition of NSA against a slow loop written from the paper's equations, and its own properties."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from configs.schema import Attention, Branch
from nsa import nsa_attention, reference
from nsa.cases import CASES, Case, make_inputs

BY_NAME = {case.name: case for case in CASES}


def run(case: Case, inputs: dict[str, Tensor], branches=tuple(Branch)) -> Tensor:
    sizes = Attention(**{**vars(case.sizes), "branches": list(branches)})
    kv = {b.value: (inputs[f"k_{b.value}"], inputs[f"v_{b.value}"]) for b in branches if b is not Branch.cmp}
    gates = inputs["gates"][..., : len(branches)]
    return nsa_attention(inputs["q"], kv, inputs["k_cmp"], inputs["v_cmp"], gates, case.cu_seqlens, sizes)


# The equations, literally: positions t, i, j count from 1 in the text and in these functions.


def softmax_over(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eq. 1 for one query and head: output and probabilities."""
    alpha = torch.stack([(q @ k / math.sqrt(len(q))) for k in keys]).softmax(dim=0)
    return sum(a * v for a, v in zip(alpha, values)), alpha


def visible_blocks(t: int, a: Attention) -> int:
    """Eq. 7: blocks i with 0 <= i <= floor((t - l) / d)."""
    return (t - a.l) // a.d + 1 if t >= a.l else 0


def p_slc(p_cmp: dict[int, float], j: int, a: Attention) -> float:
    """Eq. 9 with j and the index of p_cmp counting from 1."""
    r, s = a.l_slc // a.d, a.l // a.d
    return sum(p_cmp.get(r * j - m - n, 0.0) for m in range(r) for n in range(s))


def chosen_blocks(t: int, p_cmps: list[dict[int, float]], a: Attention) -> list[int]:
    """Eq. 10, 11, forced blocks among the n; ties to the smaller index; blocks count from 1."""
    own = (t - 1) // a.l_slc + 1
    score = {j: sum(p_slc(p, j, a) for p in p_cmps) for j in range(1, own + 1)}
    for j in score:
        if j <= a.initial or j > own - a.local:
            score[j] = math.inf
    return sorted(sorted(score, key=lambda j: (-score[j], j))[: a.n])


def slow(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, dict]:
    """(output, chosen blocks by (token, KV head)), a token, head and key at a time."""
    a, group = case.sizes, case.heads // case.kv_heads
    out, chosen = torch.zeros(case.tokens, case.heads, case.v_dim, dtype=x["q"].dtype), {}
    first_token = first_block = 0
    for length in case.lengths:
        for t in range(1, length + 1):
            row = first_token + t - 1
            seen = range(first_block, first_block + visible_blocks(t, a))
            for g in range(case.kv_heads):
                heads = range(g * group, (g + 1) * group)
                cmp = [
                    softmax_over(x["q"][row, h], [x["k_cmp"][i, g] for i in seen], [x["v_cmp"][i, g] for i in seen])
                    for h in heads
                    if len(seen)
                ]
                p_cmps = [{i + 1: p.item() for i, p in enumerate(alpha)} for _, alpha in cmp]
                picked = chosen_blocks(t, p_cmps, a)
                chosen[row, g] = [j - 1 for j in picked]
                tokens = [i for j in picked for i in range((j - 1) * a.l_slc, min(j * a.l_slc, t))]
                recent = range(max(0, t - a.w), t)
                for place, h in enumerate(heads):
                    parts = [cmp[place][0] if cmp else torch.zeros(case.v_dim, dtype=out.dtype)]
                    for name, keys in (("slc", tokens), ("win", recent)):
                        rows = [first_token + i for i in keys]
                        k, v = ([x[f"{kind}_{name}"][i, g] for i in rows] for kind in "kv")
                        parts.append(softmax_over(x["q"][row, h], k, v)[0])
                    out[row, h] = sum(x["gates"][row, h, c] * part for c, part in enumerate(parts))
        first_token += length
        first_block += visible_blocks(length, a)
    return out, chosen


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_the_equations(case):
    x = {name: t.detach() for name, t in make_inputs(case, torch.float64).items()}
    expected, chosen = slow(case, x)
    torch.testing.assert_close(run(case, x), expected, rtol=1e-9, atol=1e-9)
    for (row, g), blocks in chosen.items():
        assert selection(case, x)[row][g] == blocks


def selection(case: Case, x: dict[str, Tensor]) -> list[list[list[int]]]:
    """Blocks of each token and KV head by the definition's own functions."""
    a, out, blocks = case.sizes, [], reference.block_starts(case.cu_seqlens, case.sizes.l, case.sizes.d)[0].tolist()
    for i, length in enumerate(case.lengths):
        s = int(case.cu_seqlens[i])
        k = x["k_cmp"][blocks[i] : blocks[i + 1]]
        p = reference.compressed(x["q"][s : s + length], k, k, 0, a.l, a.d)[1]
        index = reference.choose(reference.importance(p, length, a.l, a.d, a.l_slc), 0, a)  # [h_kv, c, n]
        out += [[[j for j in head if j >= 0] for head in token] for token in index.transpose(0, 1).tolist()]
    return out


@pytest.mark.parametrize("branches", [(b,) for b in Branch] + [(Branch.win, Branch.cmp)], ids=str)
def test_branches_alone_are_the_parts_of_the_sum(branches):
    case = BY_NAME["packed"]
    x = make_inputs(case, torch.float64)
    gates = torch.zeros_like(x["gates"])
    for c, b in enumerate(Branch):
        if b in branches:
            gates[..., c] = x["gates"][..., branches.index(b)]
    torch.testing.assert_close(run(case, x, branches), run(case, {**x, "gates": gates}))


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


@pytest.mark.parametrize(("branch", "case"), [(Branch.slc, "blocks for all"), (Branch.win, "window beyond")])
def test_is_dense_softmax_where_nothing_is_left_out(branch, case):
    case = BY_NAME[case]
    x = make_inputs(case, torch.float64)
    x["gates"] = torch.ones_like(x["gates"])
    ours = run(case, x, (branch,))
    k, v = x[f"k_{branch.value}"], x[f"v_{branch.value}"]
    documents = itertools.pairwise(case.cu_seqlens.tolist())
    plain = torch.cat([dense(x["q"][s:e], k[s:e], v[s:e]) for s, e in documents])
    torch.testing.assert_close(ours, plain)
    names = ["q", f"k_{branch.value}", f"v_{branch.value}"]
    for a, b in zip(*(torch.autograd.grad(o.sin().sum(), [x[n] for n in names]) for o in (ours, plain))):
        torch.testing.assert_close(a, b)


def test_packed_documents_equal_documents_alone():
    case = BY_NAME["packed"]
    x = make_inputs(case, torch.float64)
    packed = run(case, x)
    token = block = 0
    for length in case.lengths:
        alone = Case("alone", (length,), sizes=case.sizes)
        rows, blocks = slice(token, token + length), slice(block, block + alone.blocks)
        part = {name: t[blocks if name.endswith("cmp") else rows] for name, t in x.items()}
        torch.testing.assert_close(run(alone, part), packed[rows], rtol=0, atol=0)
        token, block = token + length, block + alone.blocks


@pytest.mark.parametrize("changed", [0, 31, 32, 63, 95])
def test_no_output_depends_on_later_tokens(changed):
    case = BY_NAME["plain"]
    x = {name: t.detach() for name, t in make_inputs(case, torch.float32).items()}
    before = run(case, x)
    ends = torch.arange(case.blocks) * case.sizes.d + case.sizes.l - 1
    for name, t in x.items():
        later = ends >= changed if name.endswith("cmp") else torch.arange(case.tokens) >= changed
        t[later] = torch.randn_like(t[later]) * 3
    after = run(case, x)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed:], after[changed:])


def test_gradients_are_right():
    case = Case("tiny", (9, 21), heads=2, kv_heads=1, qk_dim=2, v_dim=3, sizes=Attention(l=4, d=2, l_slc=4, n=3, w=3))
    x = make_inputs(case, torch.float64)
    assert torch.autograd.gradcheck(lambda *values: run(case, dict(zip(x, values))), tuple(x.values()))


def test_chunks_change_nothing(monkeypatch):
    case = BY_NAME["odd length"]
    results = []
    for chunk, keep in ((1000, 1000), (16, 1000), (16, 0), (7, 0)):
        monkeypatch.setattr(reference, "CHUNKS", (chunk, chunk))
        monkeypatch.setattr(reference, "KEEP", keep)
        x = make_inputs(case, torch.float64)
        o = run(case, x)
        o.sin().sum().backward()
        results.append([o.detach(), *(t.grad for t in x.values())])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


def test_before_the_first_block_the_compressed_branch_is_zero_with_zero_gradient():
    case = BY_NAME["plain"]
    x = make_inputs(case, torch.float32)
    early = case.sizes.l - 1
    o = run(case, x, (Branch.cmp,))
    assert torch.equal(o[:early], torch.zeros_like(o[:early]))
    assert (o[early:] != 0).any()
    o[:early].sum().backward()
    assert all(t.grad is None or torch.equal(t.grad, torch.zeros_like(t)) for t in x.values())


def test_all_gradients_are_finite_for_every_case():
    for case in CASES:
        x = make_inputs(case, torch.float32)
        run(case, x).sum().backward()
        for name, t in x.items():
            if t.numel():
                assert t.grad is not None, (case.name, name)
                assert t.grad.isfinite().all(), (case.name, name)


def test_ties_go_to_the_smaller_block_and_forced_blocks_are_always_in():
    a = Attention(l=4, d=4, l_slc=4, n=5, initial=1, local=2)
    index = reference.choose(torch.zeros(1, 40, 10), 0, a)[0]
    for t in range(40):
        own = t // 4
        forced = {j for j in (0, own - 1, own) if j >= 0}
        free = [j for j in range(own + 1) if j not in forced][: max(0, 5 - len(forced))]
        assert [j for j in index[t].tolist() if j >= 0] == sorted(forced | set(free))


def test_overlap_weights_of_the_default_sizes():
    p = torch.eye(12)[:, None, None]  # a query for each compressed block alone
    weights = reference.importance(p, 64 * 3, 32, 16, 64)[:, 0]
    assert weights[:, 1].tolist() == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0]


def test_compression_of_a_block_by_hand():
    x = torch.randn(10, 2, 3, dtype=torch.float64)
    pe, w1, b1 = torch.randn(4, 3).double(), torch.randn(5, 12).double(), torch.randn(5).double()
    w2, b2 = torch.randn(3, 5).double(), torch.randn(3).double()
    _, first, place = reference.block_starts(torch.tensor([0, 3, 10]), 4, 2)
    assert first.tolist() == [3, 5]
    assert place.tolist() == [0, 2]
    out = reference.compress_mlp(x, first, pe, w1, b1, w2, b2)
    for m, s in enumerate(first.tolist()):
        for h in range(2):
            hidden = w1 @ (x[s : s + 4, h] + pe).flatten() + b1
            expected = w2 @ torch.nn.functional.gelu(hidden) + b2
            torch.testing.assert_close(out[m, h], expected)
    torch.testing.assert_close(reference.compress_mean(x, first, 4)[1], x[5:9].mean(dim=0))


def test_bf16_is_close_and_stays_bf16():
    case = BY_NAME["packed"]
    x = {name: t.detach().bfloat16() for name, t in make_inputs(case, torch.float32).items()}
    o = run(case, x)
    assert o.dtype is torch.bfloat16
    exact = run(case, {name: t.double() for name, t in x.items()})
    torch.testing.assert_close(o.double(), exact, rtol=1e-2, atol=1e-2)
