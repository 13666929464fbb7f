"""The compression MLP (Eq. 7), and its first layer alone, over blocks read where they lie: none is copied."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from nsa.tiles import locate, precision, rows

BM = 64  # rows (block, head) of a tile


@triton.jit
def _first_layer(
    at, step, there, w, unit, hidden,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """[BM, BN]: the sum over tokens of x[row, token] @ w[unit, token].

    Rows begin `at` [BM], and have a token every `step`: a number, or of each row [BM, 1].
    """
    inner = tl.arange(0, BK)
    at, at_w = at[:, None] + inner[None, :], w + unit[None, :] * (TOKENS * WIDTH) + inner[:, None]
    acc = tl.zeros([BM, BN], tl.float32)
    STEPS: tl.constexpr = WIDTH // BK
    for i in tl.range(0, TOKENS * STEPS):
        a = tl.load(at + (i // STEPS) * step + i % STEPS * BK, mask=there[:, None], other=0.0)
        b = tl.load(at_w + i * BK, mask=(unit < hidden)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=EXACT)
    return acc


@triton.jit
def _forward(
    x, w, y, first, count, groups, hidden, x_t, x_h,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y[block, head] = sum over tokens of x[first[block] + token, head] @ w[:, token]."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    unit = tl.program_id(1) * BN + tl.arange(0, BN)
    there = row < count
    token = tl.load(first + row // groups, mask=there, other=0).to(tl.int64)
    at = x + token * x_t + row % groups * x_h
    acc = _first_layer(at, x_t, there, w, unit, hidden, TOKENS, WIDTH, BM, BN, BK, EXACT)
    out = y + row.to(tl.int64)[:, None] * hidden + unit[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=there[:, None] & (unit < hidden)[None, :])


@triton.jit
def _phi(
    x, pe, w1, b1, w2, b2, y, before, x_t, x_h, first, count, groups,
    TOKENS: tl.constexpr, BM: tl.constexpr, EXACT: tl.constexpr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y[block, head] of BM - 1 rows, and the hidden units `before` the GELU.

    The last row of the tile is the position encoding: what it sums to belongs to every row.
    """
    place, unit = tl.arange(0, BM), tl.arange(0, BH)
    last, row = place == BM - 1, tl.program_id(0) * (BM - 1) + place
    there = (row < count) & ~last
    token = tl.load(first + row // groups, mask=there, other=0).to(tl.int64)
    at = tl.where(last, pe, x + token * x_t + row % groups * x_h)
    step = tl.where(last, WIDTH, x_t)[:, None]
    acc = _first_layer(at, step, there | last, w1, unit, HIDDEN, TOKENS, WIDTH, BM, BH, BK, EXACT)
    bias = tl.sum(tl.where(last[:, None], acc, 0.0), 0) + tl.load(b1 + unit, mask=unit < HIDDEN, other=0.0)
    hidden = (acc + bias[None, :]).to(x.dtype.element_ty)
    row = row.to(tl.int64)[:, None]
    tl.store(before + row * HIDDEN + unit[None, :], hidden, mask=there[:, None] & (unit < HIDDEN)[None, :])
    h = hidden.to(tl.float32)
    g = (0.5 * h * (1 + tl.erf(h * 0.5**0.5))).to(hidden.dtype)
    for j in tl.range(0, WIDTH, BN):
        column = j + tl.arange(0, BN)
        w = tl.load(w2 + column[None, :] * HIDDEN + unit[:, None], mask=(unit < HIDDEN)[:, None], other=0.0)
        out = tl.dot(g, w, input_precision=EXACT) + tl.load(b2 + column).to(tl.float32)[None, :]
        tl.store(y + row * WIDTH + column[None, :], out.to(hidden.dtype), mask=there[:, None])


@triton.jit
def _both(
    k, v, first, count, groups,
    TOKENS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """`_phi` of keys and of values, each with weights and sizes of its own."""
    if tl.program_id(1) == 0:
        _phi(*k, first, count, groups, TOKENS, BM, EXACT, K[0], K[1], K[2], K[3], K[4])
    else:
        _phi(*v, first, count, groups, TOKENS, BM, EXACT, V[0], V[1], V[2], V[3], V[4])


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
        bn = max(16, min(128, triton.next_power_of_2(hidden)))
        _forward[triton.cdiv(count, BM), triton.cdiv(hidden, bn)](
            x, w, y, first, count, groups, hidden, *x.stride()[:2],
            TOKENS=l, WIDTH=width, BM=BM, BN=bn, BK=_part(width, 64), EXACT=precision(x), num_warps=4, num_stages=4,
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


def _save_linear(ctx, inputs, output):
    *tensors, ctx.l, ctx.d = inputs
    ctx.save_for_backward(*tensors)


def _backward_linear(ctx, dy):
    dx, dw = _block_linear_backward(dy, *ctx.saved_tensors, ctx.l, ctx.d)
    return dx, dw, None, None, None, None, None


block_linear.register_autograd(_backward_linear, setup_context=_save_linear)


def _cut(x: Tensor, hidden: int) -> tuple[int, ...]:
    """Sizes of `_phi`: width, hidden units, and of a tile the units, channels of x, and channels of y.

    Products of fp32 take more registers: there are fewer channels at a time, so that none spills.
    """
    width, units, size = x.shape[2], max(16, triton.next_power_of_2(hidden)), x.element_size()
    room = 16384 // (units * size)
    return width, hidden, units, _part(width, min(128, room * 4 // size)), _part(width, min(64, room))


@library.custom_op("sparsetron::compress", mutates_args=())
def _compress(
    k: Tensor, v: Tensor, phi_k: Sequence[Tensor], phi_v: Sequence[Tensor],
    first: Tensor, tokens: Tensor, blocks: Tensor, l: int, d: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compressed keys and values, and for backward the hidden units of both before the GELU."""
    pairs = [(rows(x), [w.contiguous() for w in phi]) for x, phi in ((k, phi_k), (v, phi_v))]
    groups, m = k.shape[1], len(first)
    out = [k.new_empty(m, groups, size) for size in (k.shape[2], v.shape[2], len(phi_k[2]), len(phi_v[2]))]
    if m:
        both = [(x, *phi, y, h, *x.stride()[:2]) for (x, phi), y, h in zip(pairs, out, out[2:])]
        cuts = [_cut(x, h.shape[2]) for x, h in zip((k, v), out[2:])]
        large = max(units for _, _, units, *_ in cuts) * k.element_size() > 256
        _both[triton.cdiv(m * groups, BM - 1), 2](
            *both, first, m * groups, groups,
            TOKENS=l, K=cuts[0], V=cuts[1], BM=BM, EXACT=precision(k), num_warps=8 if large else 4, num_stages=3,
        )  # fmt: skip
    return tuple(out)


@_compress.register_fake
def _(k, v, phi_k, phi_v, first, tokens, blocks, l, d):
    sizes = k.shape[2], v.shape[2], len(phi_k[2]), len(phi_v[2])
    return tuple(k.new_empty(len(first), k.shape[1], size) for size in sizes)


def _save(ctx, inputs, output):
    k, v, phi_k, phi_v, *rest, ctx.l, ctx.d = inputs
    hidden = output[2:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*hidden)
    both = [(x, pe, w1, w2, h) for x, (pe, w1, _, w2, _), h in zip((k, v), (phi_k, phi_v), hidden)]
    ctx.save_for_backward(*both[0], *both[1], *rest)


def _backward(ctx, dk, dv, *_):
    kept = ctx.saved_tensors  # read once, as activation recomputation asks for
    given = (*kept[10:], ctx.l, ctx.d)
    (k, phi_k), (v, phi_v) = _gradients(dk, *kept[:5], *given), _gradients(dv, *kept[5:10], *given)
    return k, v, phi_k, phi_v, None, None, None, None, None


def _gradients(dy, x, pe, w1, w2, hidden, *given):
    """Of x, and of the weights of its phi."""
    if dy is None:
        return None, [None] * 5
    dy, units = dy.flatten(0, 1), hidden.flatten(0, 1)
    dw2 = dy.T @ F.gelu(units)
    dh = torch.ops.aten.gelu_backward(dy @ w2, units)
    dx, dw1 = _block_linear_backward(dh.view_as(hidden), x, w1, *given)
    db1 = dh.sum(0)  # of all rows; the position encoding is a part of each of them
    return dx, [(db1 @ w1).view_as(pe), torch.addr(dw1, db1, pe.flatten()), db1, dw2, dy.sum(0)]


_compress.register_autograd(_backward, setup_context=_save)


def compress(
    k: Tensor, v: Tensor, phi_k: Sequence[Tensor], phi_v: Sequence[Tensor],
    first: Tensor, tokens: Tensor, blocks: Tensor, l: int, d: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.compress_mlp` of keys k [n, h, dk] and of values v [n, h, dv]: [m, h, dk] and [m, h, dv], at once.

    phi_k and phi_v are pe, w1, b1, w2, b2 of each, with at most `memory.UNITS` hidden units; the rest is as in
    `block_linear`.
    """
    return _compress(k, v, phi_k, phi_v, first, tokens, blocks, l, d)[:2]
