"""The gated sum of the branches (Eq. 5), and what its gradient needs of each."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _sum(o1, o2, o3, gates, out, count, F: tl.constexpr, BRANCHES: tl.constexpr, BR: tl.constexpr):
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
def _branch(do, o, gate, dgate, delta, weight, row, there, to, F: tl.constexpr):
    """What backward needs of one branch: <do, o> and the gate, in fp32."""
    f = tl.arange(0, F)
    dot = tl.sum(do * tl.load((o + row * F)[:, None] + f[None, :], mask=there[:, None], other=0.0).to(tl.float32), 1)
    tl.store(delta + to, dot, mask=there)
    tl.store(weight + to, tl.load(gate, mask=there, other=0.0).to(tl.float32), mask=there)
    tl.store(dgate, dot.to(dgate.dtype.element_ty), mask=there)


@triton.jit
def _products(
    do, gates, dgates, o1, o2, o3, delta1, delta2, delta3, weight1, weight2, weight3,
    count, heads, do_t, do_h, t1, h1, t2, h2, t3, h3, F: tl.constexpr, BRANCHES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    there = row < count
    token, head, row = (row // heads).to(tl.int64), row % heads, row.to(tl.int64)
    at = (do + token * do_t + head * do_h)[:, None] + tl.arange(0, F)[None, :]
    d = tl.load(at, mask=there[:, None], other=0.0).to(tl.float32)
    gate, dgate = gates + row * BRANCHES, dgates + row * BRANCHES
    _branch(d, o1, gate, dgate, delta1, weight1, row, there, token * t1 + head * h1, F)
    if BRANCHES > 1:
        _branch(d, o2, gate + 1, dgate + 1, delta2, weight2, row, there, token * t2 + head * h2, F)
    if BRANCHES > 2:
        _branch(d, o3, gate + 2, dgate + 2, delta3, weight3, row, there, token * t3 + head * h3, F)


def gated_sum(outputs: list[Tensor], gates: Tensor) -> Tensor:
    """sum_c gates[..., c] * outputs[c]: outputs [n, h, dv] each, gates [n, h, branches], both contiguous."""
    out = outputs[0].new_empty(outputs[0].shape)
    count, width = outputs[0].shape[:2].numel(), out.shape[2]
    three = (outputs + outputs[:1] * 2)[:3]
    br = max(1, 8192 // width)
    _sum[triton.cdiv(count, br),](*three, gates, out, count, F=width, BRANCHES=len(outputs), BR=br, num_warps=8)
    return out


def products(do: Tensor, outputs: list[Tensor], lses: list[Tensor], gates: Tensor) -> tuple[Tensor, list, list]:
    """dgates [n, h, branches]; and of each branch <do, o> and the gate, [n, h] fp32, strided like its lse.

    do [n, h, dv]; outputs [n, h, dv] and gates [n, h, branches] contiguous.
    """
    n, heads, width = do.shape
    dgates = torch.empty_like(gates)
    deltas, weights = ([torch.empty_like(x) for x in lses] for _ in range(2))
    three = [(x + x[:1] * 2)[:3] for x in (outputs, deltas, weights)]
    br = max(1, 2048 // width)
    _products[triton.cdiv(n * heads, br),](
        do, gates, dgates, *three[0], *three[1], *three[2], n * heads, heads, *do.stride()[:2],
        *(s for x in three[1] for s in x.stride()), F=width, BRANCHES=len(outputs), BR=br, num_warps=4,
    )  # fmt: skip
    return dgates, deltas, weights
