"""The gated sum of the branches (Eq. 5), and what its gradient needs of each."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum(o1, o2, o3, gates, out, count, F: tl.constexpr, BRANCHES: tl.constexpr, BR: tl.constexpr):
    """out [count, F] = sum over branches of gate * o, BR rows (token, head) a program."""
    row, f = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64), tl.arange(0, F)
    there = row < count
    at = row[:, None] * F + f[None, :]
    gate = gates + row * BRANCHES
    total = tl.load(gate, mask=there, other=0.0).to(tl.float32)[:, None] * tl.load(
        o1 + at, mask=there[:, None], other=0.0
    ).to(tl.float32)
    if BRANCHES > 1:
        total += tl.load(gate + 1, mask=there, other=0.0).to(tl.float32)[:, None] * tl.load(
            o2 + at, mask=there[:, None], other=0.0
        ).to(tl.float32)
    if BRANCHES > 2:
        total += tl.load(gate + 2, mask=there, other=0.0).to(tl.float32)[:, None] * tl.load(
            o3 + at, mask=there[:, None], other=0.0
        ).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there[:, None])


@triton.jit
def _branch(
    do, o, gate, dgate, lse, shift, delta, row, there, token, head, n, room, GS: tl.constexpr, F: tl.constexpr
):  # fmt: skip
    """What backward needs of one branch: <do, o>, and the logarithm that softmax with its gate takes off."""
    f = tl.arange(0, F)
    dot = tl.sum(do * tl.load((o + row * F)[:, None] + f[None, :], mask=there[:, None], other=0.0).to(tl.float32), 1)
    to = (head // GS * room + token) * GS + head % GS
    tl.store(delta + to, dot, mask=token < room)  # 0 where there is no token
    log = tl.log2(tl.load(gate, mask=there, other=0.0).to(tl.float32))  # -inf for 0: then exp2(s - shift) is 0
    total = tl.load(lse + (head // GS * n + token) * GS + head % GS, mask=there, other=0.0)
    tl.store(shift + to, total - log, mask=there)
    tl.store(dgate, dot.to(dgate.dtype.element_ty), mask=there)


@triton.jit
def _products(
    do, gates, dgates, o1, o2, o3, lse1, lse2, lse3, shift1, shift2, shift3, delta1, delta2, delta3,
    n, room, heads, do_t, do_h, GS1: tl.constexpr, GS2: tl.constexpr, GS3: tl.constexpr,
    F: tl.constexpr, BRANCHES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`_branch` for each branch, of BR rows (token, head) a program."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < n * heads
    token, head, row = row // heads, row % heads, row.to(tl.int64)
    at = (do + token.to(tl.int64) * do_t + head * do_h)[:, None] + tl.arange(0, F)[None, :]
    d = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    gate, dgate = gates + row * BRANCHES, dgates + row * BRANCHES
    _branch(d, o1, gate, dgate, lse1, shift1, delta1, row, there, token, head, n, room, GS1, F)
    if BRANCHES > 1:
        _branch(d, o2, gate + 1, dgate + 1, lse2, shift2, delta2, row, there, token, head, n, room, GS2, F)
    if BRANCHES > 2:
        _branch(d, o3, gate + 2, dgate + 2, lse3, shift3, delta3, row, there, token, head, n, room, GS3, F)


def gated_sum(outputs: list[Tensor], gates: Tensor) -> Tensor:
    """sum_c gates[..., c] * outputs[c]: outputs [n, h, dv] each, gates [n, h, branches], both contiguous."""
    out = outputs[0].new_empty(outputs[0].shape)
    count, width = outputs[0].shape[:2].numel(), out.shape[2]
    three = (outputs + outputs[:1] * 2)[:3]
    br = max(1, 8192 // width)
    _sum[triton.cdiv(count, br),](*three, gates, out, count, F=width, BRANCHES=len(outputs), BR=br, num_warps=8)
    return out


def products(do: Tensor, outputs: list[Tensor], lses: list[Tensor], gates: Tensor) -> tuple[Tensor, list, list]:
    """dgates [n, h, branches]; and of each branch shift = lse - log2(gate) and delta = <do, o>.

    So exp2(score - shift) is a probability times its gate, which is at least 0. Both are laid out like the branch's lse
    [h / s, n, s], but with room for a multiple of 4 tokens, so that the copy engine can fetch any 4 aligned ones.

    do [n, h, dv]; outputs [n, h, dv] and gates [n, h, branches] contiguous.
    """
    n, heads, width = do.shape
    dgates = torch.empty_like(gates)
    room = triton.cdiv(n, 4) * 4
    shifts, deltas = ([x.new_empty(len(x), room, x.shape[2]) for x in lses] for _ in range(2))
    three = [(x + x[:1] * 2)[:3] for x in (outputs, lses, shifts, deltas)]
    br = max(1, 2048 // width)
    _products[triton.cdiv(room * heads, br),](
        do, gates, dgates, *three[0], *three[1], *three[2], *three[3], n, room, heads, *do.stride()[:2],
        *(x.shape[2] for x in three[1]), F=width, BRANCHES=len(outputs), BR=br, num_warps=4,
    )  # fmt: skip
    return dgates, shifts, deltas
