"""Attention to a band of keys: the compressed branch, the window, and the local part of the selection.

A tile of rows holds neighbouring queries with all the heads of their group: they share keys, and a mask is needed only
where the band ends. Softmax is in base 2 and fp32. Sums go in a fixed order, so that results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.schema import Attention, Branch
from nsa import hopper_band
from nsa.bands import FAR, SHORT_BAND, bands, beyond, edges, lowest, tile_at
from nsa.memory import everything
from nsa.tiles import LOG2E, Documents, Launch, boxes, columns, halves, kind, locate, precision

NAMES = [b.value for b in Branch]

# By `tiles.kind`; timed on an H200 for 16 bits.
FORWARD = {
    "narrow": Launch(64, 64, 4, 3), "middle": Launch(64, 64, 4, 3), "wide": Launch(64, 64, 4, 2),
    "fp32": Launch(64, 32, 4, 2),
}  # fmt: skip
SHORT = Launch(64, 32, 4, 3)  # for what `shares_registers`


@triton.jit
def _attend(
    acc, total, peak, q, q2, k, k_rest, v, base, k_at, v_at, sinks, first, lefts, inner, count, low, high, far, scale,
    E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows q over `count` tiles of BN keys; see `tile_at` for where they are.

    A row sees the keys [low, high), and of the first `sinks` tiles those before `far`.
    """
    column = tl.arange(0, BN)
    for i in tl.range(0, count):
        j = tile_at(i, sinks, first, lefts, inner, BN)
        k1 = k.load([base + j, k_at])
        s = tl.dot(q, k1.T, input_precision=EXACT)
        if E2 > 0:
            s = tl.dot(q2, k_rest.load([base + j, k_at + E]).T, s, input_precision=EXACT)
        if MASK:
            begin, end = tl.where(i < sinks, 0, low), tl.where(i < sinks, far, high)
            seen = ((j + column)[None, :] >= begin[:, None]) & ((j + column)[None, :] < end[:, None])
            s = tl.where(seen, s, float("-inf"))
            top = tl.maximum(peak, tl.max(s, 1) * scale)
            ground = tl.where(top == float("-inf"), 0.0, top)
        else:
            top = tl.maximum(peak, tl.max(s, 1) * scale)
            ground = top
        p = tl.exp2(s * scale - ground[:, None])
        shrink = tl.exp2(peak - ground)
        total = total * shrink + tl.sum(p, 1)
        peak = top
        values = v.load([base + j, v_at])
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=EXACT)
    return acc, total, peak


@triton.jit
def _band(
    q, q2, k, k_rest, v, o, lse, base, k_at, v_at, start, place, length, n, heads, group, scale,
    G: tl.constexpr, GS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, A: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr, SINK: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One branch of a tile of queries; they also see the first SINK keys, as far as these lie before the band."""
    row = tl.arange(0, BQ * G)
    t, head = place + row // G, group * G + row % G
    low, high = lowest(t, A, N, ALL), beyond(t, L, D)
    last = tl.minimum(place + BQ, length) - 1
    first, first_last, short = lowest(place, A, N, ALL), lowest(last, A, N, ALL), N * A <= SHORT_BAND * BN
    lefts, left, whole, inner, rights = edges(first, first_last, beyond(place, L, D), beyond(last, L, D), short, BN)
    sinks = (tl.minimum(first_last, SINK) + BN - 1) // BN
    acc = tl.zeros([BQ * G, F], tl.float32)
    total = tl.zeros([BQ * G], tl.float32)
    peak = total - float("inf")
    if not short:
        acc, total, peak = _attend(
            acc, total, peak, q, q2, k, k_rest, v, base, k_at, v_at, 0, left, 0, left, whole, low, high, low, scale,
            E, E2, F, BN, False, EXACT,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, q2, k, k_rest, v, base, k_at, v_at, sinks, first, lefts, inner, sinks + lefts + rights,
        low, high, tl.minimum(low, SINK), scale, E, E2, F, BN, True, EXACT,
    )  # fmt: skip
    some, there = total > 0, t < length
    acc = acc * (1.0 / tl.where(some, total, 1.0))[:, None]
    out = (o + ((start + t).to(tl.int64) * heads + head) * F)[:, None] + tl.arange(0, F)[None, :]
    tl.store(out, acc.to(o.dtype.element_ty), mask=there[:, None])
    log = tl.where(some, peak + tl.log2(tl.where(some, total, 1.0)), float("inf"))  # exp2(s - inf) = 0 in backward
    tl.store(lse + (head // GS * n + start + t) * GS + head % GS, log, mask=there)


@triton.jit(do_not_specialize=["documents", "n"])
def _forward(
    q, q_rest, k1, k1_rest, v1, o1, lse1, k2, k2_rest, v2, o2, lse2, k3, k3_rest, v3, o3, lse3,
    tokens, blocks, documents, scale, k1_h, v1_h, k2_h, v2_h, k3_h, v3_h, n, heads,
    G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    CMP: tl.constexpr, SLC: tl.constexpr, WIN: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, A: tl.constexpr, LOCAL: tl.constexpr, ALL: tl.constexpr, SINK: tl.constexpr,
    W: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """o [n, h, F] and log-sum-exp of each branch, of a tile of queries and one KV head."""
    tile, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # the longest first
    document, start, length, place = locate(tile, tokens, documents, BQ)
    if place >= length:
        return
    q1 = q.load([start + place, group * G, 0]).reshape(BQ * G, E)
    q2 = q1
    if E2 > 0:
        q2 = q_rest.load([start + place, group * G, E]).reshape(BQ * G, E2)
    if CMP:
        _band(
            q1, q2, k1, k1_rest, v1, o1, lse1, tl.load(blocks + document), group * k1_h, group * v1_h, start, place,
            length, n, heads, group, scale, G, 1, E, E2, F, L, D, 1, FAR, 0, 0, BQ, BN, EXACT,
        )  # fmt: skip
    if SLC:
        _band(
            q1, q2, k2, k2_rest, v2, o2, lse2, start, group * k2_h, group * v2_h, start, place, length, n, heads, group,
            scale, G, G, E, E2, F, 1, 1, A, LOCAL, ALL, SINK, BQ, BN, EXACT,
        )  # fmt: skip
    if WIN:
        _band(
            q1, q2, k3, k3_rest, v3, o3, lse3, start, group * k3_h, group * v3_h, start, place, length, n, heads, group,
            scale, G, G, E, E2, F, 1, 1, 1, W, 0, 0, BQ, BN, EXACT,
        )  # fmt: skip


def branches(kv: dict[str, tuple[Tensor, Tensor]], rows: int, extra: dict[str, tuple]) -> tuple[list, list, dict]:
    """Of cmp, slc and win, for a kernel that takes all three: their tensors, strides, and which of them are there.

    In the place of one that is not there stands another.
    """
    there = {name: name in kv and len(kv[name][0]) > 0 for name in NAMES}
    some = next(name for name in NAMES if there[name])
    tensors, strides = [], []
    for name in NAMES:
        name = name if there[name] else some
        k, v = kv[name]
        tensors += [*columns(k, rows), columns(v, rows)[0], *extra[name]]
        strides += [k.stride(1), v.stride(1)]
    return tensors, strides, {name.upper(): there[name] for name in NAMES}


def shares_registers(kv: dict[str, tuple[Tensor, Tensor]], how: Launch) -> bool:
    """Whether ptxas 12.8 would make wrong code: with the local blocks alone and heads as wide as a tile has columns it
    keeps what stays the same in a loop in registers of what does not, and all tiles of keys but the first go wrong."""
    return list(kv) == ["slc"] and kv["slc"][0].shape[2] == how.columns


def forward(
    q: Tensor, kv: dict[str, tuple[Tensor, Tensor]], documents: Documents, sizes: Attention
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each branch o [n, h, dv] in q's dtype and the base-2 log-sum-exp [h / s, n, s] fp32, +inf without a key.

    q [n, h, dk]; kv {branch: (k [m, h_kv, dk], v [m, h_kv, dv])}, over compression blocks for cmp. Of slc these are the
    local and the first blocks. Of the log-sum-exp s = `Band.run` heads lie side by side.
    """
    n, heads, e = q.shape
    key, value = next(iter(kv.values()))
    out, g, how = {}, heads // key.shape[1], FORWARD[kind(q, value)]
    how = SHORT if shares_registers(kv, how) else how
    for name, (k, v) in kv.items():
        run = bands(sizes)[name].run(g)
        o, lse = q.new_empty(n, heads, v.shape[2]), q.new_empty(heads // run, n, run, dtype=torch.float32)
        out[name] = (o, lse) if len(k) else (o.zero_(), lse.fill_(torch.inf))
    kv = {name: pair for name, pair in kv.items() if len(pair[0])}
    if not kv:
        return out
    if hopper_band.fits(q, value, g):
        hopper_band.forward(q.contiguous(), kv, out, documents, sizes)
        return out
    bq, bn, (e1, e2) = how.queries(g), how.columns, halves(e)
    tensors, strides, there = branches(kv, bn, out)
    _forward[documents.tiles(bq), heads // g](
        *boxes(q, bq, g), *tensors, documents.tokens, documents.blocks, documents.count, e**-0.5 * LOG2E, *strides,
        n, heads, G=g, E=e1, E2=e2, F=o.shape[2], **there, L=sizes.l, D=sizes.d, A=sizes.l_slc, LOCAL=sizes.local,
        ALL=everything(sizes), SINK=sizes.initial * sizes.l_slc, W=sizes.w, BQ=bq, BN=bn, EXACT=precision(q),
        **how.options,
    )  # fmt: skip
    return out
