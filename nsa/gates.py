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
def _product(
    do, o, gates, dgates, delta, weight, count, heads, do_t, do_h, delta_t, delta_h, gate_t, gate_h, branches,
    F: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    row, f = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64), tl.arange(0, F)
    there = row < count
    token, head = row // heads, row % heads
    a = tl.load((do + token * do_t + head * do_h)[:, None] + f[None, :], mask=there[:, None], other=0.0)
    b = tl.load((o + row * F)[:, None] + f[None, :], mask=there[:, None], other=0.0)
    dot = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    to = token * delta_t + head * delta_h
    tl.store(delta + to, dot, mask=there)
    gate = tl.load(gates + token * gate_t + head * gate_h, mask=there, other=0.0)
    tl.store(weight + to, gate.to(tl.float32), mask=there)
    tl.store(dgates + row * branches, dot.to(dgates.dtype.element_ty), mask=there)


def gated_sum(outputs: list[Tensor], gates: Tensor) -> Tensor:
    """sum_c gates[..., c] * outputs[c]: outputs [n, h, dv] each, gates [n, h, branches], both contiguous."""
    out = outputs[0].new_empty(outputs[0].shape)
    count, width = outputs[0].shape[:2].numel(), out.shape[2]
    three = (outputs + outputs[:1] * 2)[:3]
    br = max(1, 8192 // width)
    _sum[triton.cdiv(count, br),](*three, gates, out, count, F=width, BRANCHES=len(outputs), BR=br, num_warps=8)
    return out


def product(do: Tensor, o: Tensor, gate: Tensor, lse: Tensor, dgate: Tensor) -> tuple[Tensor, Tensor]:
    """(<do, o>, gate), each [n, h] fp32 and strided like lse; the first also goes to dgate, a column of [n, h, branches].

    do and o [n, h, dv], o contiguous; gate [n, h].
    """
    n, heads, width = o.shape
    delta, weight = torch.empty_like(lse), torch.empty_like(lse)
    br = max(1, 4096 // width)
    _product[triton.cdiv(n * heads, br),](
        do, o, gate, dgate, delta, weight, n * heads, heads, *do.stride()[:2], *delta.stride(), *gate.stride(),
        dgate.stride(1), F=width, BR=br, num_warps=4,
    )  # fmt: skip
    return delta, weight
