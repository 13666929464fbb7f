"""The first layer of the compression MLP (Eq. 7), over blocks read where they lie: none is copied."""

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from nsa.tiles import locate, precision, rows


@triton.jit
def _forward(
    x, w, y, first, count, groups, hidden, x_t, x_h,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[block, head] = sum over tokens of x[first[block] + token, head] @ w[:, token]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column, inner = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    there = row < count
    token = tl.load(first + row // groups, mask=there, other=0).to(tl.int64)
    at = (x + token * x_t + row % groups * x_h)[:, None] + inner[None, :]
    at_w = w + column[None, :] * (TOKENS * WIDTH) + inner[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    STEPS: tl.constexpr = WIDTH // BK
    for i in tl.range(0, TOKENS * STEPS):
        a = tl.load(at + (i // STEPS) * x_t + i % STEPS * BK, mask=there[:, None], other=0.0)
        b = tl.load(at_w + i * BK, mask=(column < hidden)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=EXACT)
    out = y + row.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=there[:, None] & (column < hidden)[None, :])


@triton.jit(do_not_specialize=["documents"])
def _backward_x(
    dy, w, dx, tokens, blocks, documents, groups, hidden,
    TOKENS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr,
    H: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dx of the tokens at place `program_id(1)` of their strides: each lies in TOKENS // STRIDE blocks, or fewer."""
    document, start, length, place = locate(tl.program_id(0), tokens, documents, BC * STRIDE)
    if place >= length:
        return
    offset = tl.program_id(1)
    row = tl.arange(0, BC * H)
    cell, head = place // STRIDE + row // H, row % H
    column, inner = tl.program_id(2) * BN + tl.arange(0, BN), tl.arange(0, BK)
    t = cell * STRIDE + offset
    there = (t < length) & (head < groups)
    first = tl.load(blocks + document)
    count = tl.load(blocks + document + 1) - first
    acc = tl.zeros([BC * H, BN], tl.float32)
    for i in tl.static_range(TOKENS // STRIDE):
        block = cell - i
        real = there & (block >= 0) & (block < count)
        at = dy + ((first + block).to(tl.int64) * groups + head) * hidden
        at_w = w + (offset + i * STRIDE) * WIDTH + column
        for k in tl.range(0, hidden, BK):
            some = k + inner < hidden
            a = tl.load(at[:, None] + k + inner[None, :], mask=real[:, None] & some[None, :], other=0.0)
            b = tl.load(
                at_w[None, :] + (k + inner)[:, None] * (TOKENS * WIDTH),
                mask=some[:, None] & (column < WIDTH)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(a, b, acc, input_precision=EXACT)
    out = dx + ((start + t).to(tl.int64) * groups + head)[:, None] * WIDTH + column[None, :]
    tl.store(out, acc.to(dx.dtype.element_ty), mask=there[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _backward_w(
    dy, x, dw, first, count, groups, hidden, x_t, x_h, share,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dw [parts, hidden, TOKENS, WIDTH] of one token of all blocks; each part sums `share` rows."""
    token, part = tl.program_id(0), tl.program_id(1)
    tiles: tl.constexpr = (WIDTH + BN - 1) // BN
    unit = tl.program_id(2) // tiles * BM + tl.arange(0, BM)
    column = tl.program_id(2) % tiles * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for i in tl.range(part * share, tl.minimum(part * share + share, count), BK):
        row = i + tl.arange(0, BK)
        there = row < count
        at = (tl.load(first + row // groups, mask=there, other=0) + token).to(tl.int64) * x_t + row % groups * x_h
        b = tl.load(x + at[:, None] + column[None, :], mask=there[:, None] & (column < WIDTH)[None, :], other=0.0)
        at_y = dy + row.to(tl.int64)[None, :] * hidden + unit[:, None]
        a = tl.load(at_y, mask=there[None, :] & (unit < hidden)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=EXACT)
    out = ((part * hidden + unit)[:, None].to(tl.int64) * TOKENS + token) * WIDTH + column[None, :]
    tl.store(dw + out, acc, mask=(unit < hidden)[:, None] & (column < WIDTH)[None, :])


def _part(width: int, most: int) -> int:
    """The largest power of two that divides `width`, or `most`."""
    return min(width & -width, most)


@library.custom_op("sparsetron::block_linear", mutates_args=())
def block_linear(x: Tensor, w: Tensor, first: Tensor, tokens: Tensor, blocks: Tensor, l: int, d: int) -> Tensor:
    """w applied to the flattened blocks of l tokens of x: [n, h, e] -> [m, h, hidden].

    w [hidden, l * e] over (token, channel); first [m], the first token of each block, and tokens, blocks
    [documents + 1], where documents start in tokens and in blocks, are int32 on x's device; d is the stride of blocks.
    """
    x, w = rows(x), w.contiguous()
    _, groups, width = x.shape
    hidden, count = len(w), len(first) * groups
    y = x.new_empty(len(first), groups, hidden)
    if count:
        bm, bn = 64, max(16, min(128, triton.next_power_of_2(hidden)))
        _forward[triton.cdiv(count, bm), triton.cdiv(hidden, bn)](
            x, w, y, first, count, groups, hidden, *x.stride()[:2],
            TOKENS=l, WIDTH=width, BM=bm, BN=bn, BK=_part(width, 64), EXACT=precision(x), num_warps=4, num_stages=4,
        )  # fmt: skip
    return y


@block_linear.register_fake
def _(x, w, first, tokens, blocks, l, d):
    return x.new_empty(len(first), x.shape[1], len(w))


@library.custom_op("sparsetron::block_linear_backward", mutates_args=())
def _block_linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, first: Tensor, tokens: Tensor, blocks: Tensor, l: int, d: int
) -> tuple[Tensor, Tensor]:
    x, w, dy = rows(x), w.contiguous(), dy.contiguous()
    n, groups, width = x.shape
    hidden, count = len(w), len(first) * groups
    dx, exact = x.new_empty(n, groups, width), precision(x)
    h = triton.next_power_of_2(groups)
    bc, bn = max(1, max(64, h) // h), max(16, min(128, triton.next_power_of_2(width)))
    _backward_x[n // (bc * d) + len(tokens) - 1, d, triton.cdiv(width, bn)](
        dy, w, dx, tokens, blocks, len(tokens) - 1, groups, hidden,
        TOKENS=l, STRIDE=d, WIDTH=width, H=h, BC=bc, BN=bn, BK=min(64, max(16, triton.next_power_of_2(hidden))),
        EXACT=exact, num_warps=4, num_stages=2,
    )  # fmt: skip
    if not count:
        return dx, torch.zeros_like(w)
    parts = min(8, triton.cdiv(count, 64))
    share = triton.cdiv(triton.cdiv(count, parts), 64) * 64
    dw = torch.empty(parts, *w.shape, dtype=torch.float32, device=w.device)
    bm = max(16, min(128 if x.element_size() == 2 else 64, triton.next_power_of_2(hidden)))
    _backward_w[l, parts, triton.cdiv(hidden, bm) * triton.cdiv(width, bn)](
        dy, x, dw, first, count, groups, hidden, *x.stride()[:2], share,
        TOKENS=l, WIDTH=width, BM=bm, BN=bn, BK=64 if x.element_size() == 2 else 32, EXACT=exact,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return dx, dw.sum(0).to(w.dtype)


@_block_linear_backward.register_fake
def _(dy, x, w, first, tokens, blocks, l, d):
    return x.new_empty(x.shape), w.new_empty(w.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.l, ctx.d = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    dx, dw = _block_linear_backward(dy, *ctx.saved_tensors, ctx.l, ctx.d)
    return dx, dw, None, None, None, None, None


block_linear.register_autograd(_backward, setup_context=_save)
