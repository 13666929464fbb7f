"""The gradients of `nsa.band`: of queries by all branches at once, of keys and values branch by branch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.schema import Attention
from nsa.band import SHORT, branches, shares_registers
from nsa.bands import FAR, SHORT_BAND, Band, beyond, edges, lowest, tile_at
from nsa.memory import everything
from nsa.tiles import LOG2E, Documents, Launch, boxes, columns, halves, kind, locate, precision, stretches

# By `tiles.kind`; timed on an H200 for 16 bits.
QUERIES = {
    "narrow": Launch(64, 64, 4, 3), "middle": Launch(64, 64, 4, 3), "wide": Launch(64, 64, 4, 2),
    "fp32": Launch(64, 16, 4, 2),
}  # fmt: skip
KEYS = {
    "narrow": Launch(128, 64, 4, 2), "middle": Launch(64, 64, 4, 2), "wide": Launch(32, 64, 4, 3),
    "fp32": Launch(32, 32, 4, 1),
}  # fmt: skip
BLOCKS = {  # where keys are compression blocks
    "narrow": Launch(128, 64, 4, 2), "middle": Launch(64, 128, 8, 3), "wide": Launch(64, 128, 8, 3),
    "fp32": Launch(32, 32, 4, 1),
}  # fmt: skip


@triton.jit
def _queries_step(
    acc1, acc2, q, q2, do, shift, delta, k, k_rest, v, base, k_at, v_at, first, lefts, inner, count, low, high, scale,
    E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds dS K of `count` tiles of keys to the gradient of rows q."""
    column = tl.arange(0, BN)
    for i in tl.range(0, count):
        j = tile_at(i, 0, first, lefts, inner, BN)
        k1 = k.load([base + j, k_at])
        s = tl.dot(q, k1.T, input_precision=EXACT)
        if E2 > 0:
            k2 = k_rest.load([base + j, k_at + E])
            s = tl.dot(q2, k2.T, s, input_precision=EXACT)
        values = v.load([base + j, v_at])
        dp = tl.dot(do, values.T, input_precision=EXACT)
        p = tl.exp2(s * scale - shift[:, None])
        if MASK:
            seen = ((j + column)[None, :] >= low[:, None]) & ((j + column)[None, :] < high[:, None])
            p = tl.where(seen, p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        acc1 = tl.dot(ds, k1, acc1, input_precision=EXACT)
        if E2 > 0:
            acc2 = tl.dot(ds, k2, acc2, input_precision=EXACT)
    return acc1, acc2


@triton.jit
def _queries_band(
    acc1, acc2, q, q2, do, shift, delta, k, k_rest, v, base, k_at, v_at, start, place, length, room, group, scale,
    G: tl.constexpr, GS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, A: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds what one branch sends to a tile of queries."""
    row = tl.arange(0, BQ * G)
    t, head = place + row // G, group * G + row % G
    there = t < length
    at = (head // GS * room + start + t) * GS + head % GS
    off = tl.load(shift + at, mask=there, other=float("inf"))
    drop = tl.load(delta + at, mask=there, other=0.0)
    low, high = lowest(t, A, N, ALL), beyond(t, L, D)
    last = tl.minimum(place + BQ, length) - 1
    first, short = lowest(place, A, N, ALL), N * A <= SHORT_BAND * BN
    seen = first, lowest(last, A, N, ALL), beyond(place, L, D), beyond(last, L, D)
    lefts, left, whole, inner, rights = edges(*seen, short, BN)
    if not short:
        acc1, acc2 = _queries_step(
            acc1, acc2, q, q2, do, off, drop, k, k_rest, v, base, k_at, v_at, left, 0, left, whole, low, high, scale,
            E, E2, F, BN, False, EXACT,
        )  # fmt: skip
    acc1, acc2 = _queries_step(
        acc1, acc2, q, q2, do, off, drop, k, k_rest, v, base, k_at, v_at, first, lefts, inner, lefts + rights, low,
        high, scale, E, E2, F, BN, True, EXACT,
    )  # fmt: skip
    return acc1, acc2


@triton.jit(do_not_specialize=["documents", "room"])
def _backward_queries(
    q, q_rest, do, dq, k1, k1_rest, v1, shift1, delta1, k2, k2_rest, v2, shift2, delta2,
    k3, k3_rest, v3, shift3, delta3, tokens, blocks, documents, scale, k1_h, v1_h, k2_h, v2_h, k3_h, v3_h, room, heads,
    G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    CMP: tl.constexpr, SLC: tl.constexpr, WIN: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, A: tl.constexpr, LOCAL: tl.constexpr, ALL: tl.constexpr, W: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq [n, h, E + E2] of a tile of queries and one KV head, by all branches."""
    tile, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    document, start, length, place = locate(tile, tokens, documents, BQ)
    if place >= length:
        return
    q1 = q.load([start + place, group * G, 0]).reshape(BQ * G, E)
    q2 = q1
    if E2 > 0:
        q2 = q_rest.load([start + place, group * G, E]).reshape(BQ * G, E2)
    g_out = do.load([start + place, group * G, 0]).reshape(BQ * G, F)
    acc1, acc2 = tl.zeros([BQ * G, E], tl.float32), tl.zeros([BQ * G, E2 if E2 > 0 else 1], tl.float32)
    if CMP:
        acc1, acc2 = _queries_band(
            acc1, acc2, q1, q2, g_out, shift1, delta1, k1, k1_rest, v1, tl.load(blocks + document), group * k1_h,
            group * v1_h, start, place, length, room, group, scale, G, 1, E, E2, F, L, D, 1, FAR, 0, BQ, BN, EXACT,
        )  # fmt: skip
    if SLC:
        acc1, acc2 = _queries_band(
            acc1, acc2, q1, q2, g_out, shift2, delta2, k2, k2_rest, v2, start, group * k2_h, group * v2_h, start, place,
            length, room, group, scale, G, G, E, E2, F, 1, 1, A, LOCAL, ALL, BQ, BN, EXACT,
        )  # fmt: skip
    if WIN:
        acc1, acc2 = _queries_band(
            acc1, acc2, q1, q2, g_out, shift3, delta3, k3, k3_rest, v3, start, group * k3_h, group * v3_h, start, place,
            length, room, group, scale, G, G, E, E2, F, 1, 1, 1, W, 0, BQ, BN, EXACT,
        )  # fmt: skip
    row = tl.arange(0, BQ * G)
    t, head = place + row // G, group * G + row % G
    there = (t < length)[:, None]
    out = (dq + ((start + t).to(tl.int64) * heads + head) * (E + E2))[:, None]
    acc1 *= scale / 1.4426950408889634
    tl.store(out + tl.arange(0, E)[None, :], acc1.to(dq.dtype.element_ty), mask=there)
    if E2 > 0:
        acc2 *= scale / 1.4426950408889634
        tl.store(out + E + tl.arange(0, E2)[None, :], acc2.to(dq.dtype.element_ty), mask=there)


@triton.jit
def _keys_step(
    dk, dk2, dv, k, k2, v, q, q_rest, do, shift, delta, at, origin, head, begin, end, limit, key, scale,
    GS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, A: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
    BQ: tl.constexpr, MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds to the gradients of a tile of keys what the queries [begin, end) with GS heads each send them."""
    row = tl.arange(0, BQ * GS)
    steps = (end - begin + BQ - 1) // BQ
    # Tiles of keys at work together should read a query at one time, and share it: so backwards where all begin with
    # the document's last one; within a window, at step s those whose place is -s modulo the number of steps.
    turn = 0
    if N < FAR:
        turn = (tl.maximum(begin, 0) // BQ + steps - 1) % tl.maximum(steps, 1)  # below 0, % is too
    for step in tl.range(0, steps):
        back = step + turn
        if N < FAR:
            back = tl.where(back >= steps, back - steps, back)
        i = begin + (steps - 1 - back) * BQ
        q1 = q.load([origin + i, head, 0]).reshape(BQ * GS, E)
        s = tl.dot(k, q1.T, input_precision=EXACT)  # [keys, rows]
        if E2 > 0:
            q2 = q_rest.load([origin + i, head, E]).reshape(BQ * GS, E2)
            s = tl.dot(k2, q2.T, s, input_precision=EXACT)
        p = tl.exp2(s * scale - shift.load([at + i * GS])[None, :])
        if MASK:
            t = i + row // GS
            high = tl.where(t < limit, beyond(t, L, D), 0)  # past the document's end are any rows, or none
            seen = (key[:, None] >= lowest(t, A, N, ALL)[None, :]) & (key[:, None] < high[None, :])
            p = tl.where(seen, p, 0.0)
        g_out = do.load([origin + i, head, 0]).reshape(BQ * GS, F)
        # In this order no product has operands computed while another runs: the compiler would serialize both.
        dv = tl.dot(p.to(g_out.dtype), g_out, dv, input_precision=EXACT)
        dp = tl.dot(v, g_out.T, input_precision=EXACT)
        ds = (p * (dp - delta.load([at + i * GS])[None, :])).to(q1.dtype)
        dk = tl.dot(ds, q1, dk, input_precision=EXACT)
        if E2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=EXACT)
    return dk, dk2, dv


@triton.jit(do_not_specialize=["documents"])
def _backward_keys(
    q, q_rest, k, k_rest, v, do, shift, delta, dk, dv, tokens, keys, documents, scale, k_h, v_h, groups, room, part,
    G: tl.constexpr, GS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, A: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dk [G // GS, m, h_kv, E + E2] and dv of a tile of keys, one KV head, and GS of its queries' heads."""
    SPLIT: tl.constexpr = G // GS
    group, split = tl.program_id(1) // SPLIT, tl.program_id(1) % SPLIT
    document, first, count, place = locate(tl.program_id(0), keys, documents, BN)  # tile 0 has the most queries
    if place >= count:
        return
    start = tl.load(tokens + document)
    length = tl.load(tokens + document + 1) - start
    key = place + tl.arange(0, BN)
    k1 = k.load([first + place, group * k_h])
    k2 = k1
    dk2 = tl.zeros([BN, E2 if E2 > 0 else 1], tl.float32)
    if E2 > 0:
        k2 = k_rest.load([first + place, group * k_h + E])
    v1 = v.load([first + place, group * v_h])
    dk1, dv1 = tl.zeros([BN, E], tl.float32), tl.zeros([BN, F], tl.float32)
    # Queries that see any of the keys, then those that see all of them.
    last = tl.minimum(place + BN, count) - 1
    begin, end = place * D + L - 1, length
    begin -= (start + begin) % 4  # `gates.products` says why; what lies before the document sees none of it
    left, inner = last * D + L - 1, length
    if N < FAR:
        early = tl.where(place < ALL, ALL, 0)
        end = tl.minimum(length, tl.maximum((last // A + N) * A, early))
        inner = tl.minimum(length, tl.maximum((place // A + N) * A, early))
    left = tl.minimum(begin + (left - begin + BQ - 1) // BQ * BQ, end)
    inner = tl.maximum(left, left + (inner - left) // BQ * BQ)
    head = group * G + split * GS
    at = (head // GS * room + start) * GS  # where the numbers of the document's first token are
    # Rows of keys past the last one hold what nobody stores.
    dk1, dk2, dv1 = _keys_step(
        dk1, dk2, dv1, k1, k2, v1, q, q_rest, do, shift, delta, at, start, head, inner, end, end, key,
        scale, GS, E, E2, F, L, D, A, N, ALL, BQ, True, EXACT,
    )  # fmt: skip
    dk1, dk2, dv1 = _keys_step(
        dk1, dk2, dv1, k1, k2, v1, q, q_rest, do, shift, delta, at, start, head, left, inner, end, key,
        scale, GS, E, E2, F, L, D, A, N, ALL, BQ, False, EXACT,
    )  # fmt: skip
    dk1, dk2, dv1 = _keys_step(
        dk1, dk2, dv1, k1, k2, v1, q, q_rest, do, shift, delta, at, start, head, begin, left, end, key,
        scale, GS, E, E2, F, L, D, A, N, ALL, BQ, True, EXACT,
    )  # fmt: skip
    there = (key < count)[:, None]
    at_k = (first + key).to(tl.int64) * groups + group
    out = (dk + split * part + at_k * (E + E2))[:, None]
    tl.store(out + tl.arange(0, E)[None, :], (dk1 * (scale / 1.4426950408889634)).to(dk.dtype.element_ty), mask=there)
    if E2 > 0:
        dk2 = (dk2 * (scale / 1.4426950408889634)).to(dk.dtype.element_ty)
        tl.store(out + E + tl.arange(0, E2)[None, :], dk2, mask=there)
    out = (dv + split * (part // (E + E2) * F) + at_k * F)[:, None]
    tl.store(out + tl.arange(0, F)[None, :], dv1.to(dv.dtype.element_ty), mask=there)


def queries(
    q: Tensor, kv: dict[str, tuple[Tensor, Tensor]], do: Tensor, statistics: dict[str, tuple[Tensor, Tensor]],
    dq: Tensor, documents: Documents, sizes: Attention,
) -> None:  # fmt: skip
    """Puts into dq [n, h, dk] the gradient of q by all branches: of slc by the local blocks.

    do [n, h, dv] is the gradient of the gated output, statistics {branch: (shift, delta)} are from `gates.products`.
    """
    _, heads, e = q.shape
    if not any(len(k) for k, _ in kv.values()):
        dq.zero_()
        return
    key, value = next(iter(kv.values()))
    g, how = heads // key.shape[1], QUERIES[kind(q, value)]
    how = SHORT if shares_registers(kv, how) else how
    bq, bn, (e1, e2) = how.queries(g), how.columns, halves(e)
    tensors, strides, there = branches(kv, bn, statistics)
    _backward_queries[documents.tiles(bq), heads // g](
        *boxes(q, bq, g), boxes(do, bq, g)[0], dq, *tensors, documents.tokens, documents.blocks, documents.count,
        e**-0.5 * LOG2E, *strides, next(iter(statistics.values()))[0].shape[1], heads,
        G=g, E=e1, E2=e2, F=do.shape[2], **there, L=sizes.l, D=sizes.d, A=sizes.l_slc, LOCAL=sizes.local,
        ALL=everything(sizes), W=sizes.w, BQ=bq, BN=bn, EXACT=precision(q), **how.options,
    )  # fmt: skip


def _shape(q: Tensor, k: Tensor, v: Tensor, band: Band) -> dict[str, int]:
    e, e2 = halves(q.shape[2])
    return dict(G=q.shape[1] // k.shape[1], E=e, E2=e2, F=v.shape[2], **vars(band), EXACT=precision(q))


def _keys(documents: Documents, band: Band) -> Tensor:
    return documents.blocks if band.keyed_by_block else documents.tokens


def room(k: Tensor, v: Tensor, group: int, band: Band, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """For the gradients of k [m, h_kv, dk] and v: [sums, m, h_kv, dk] and the same of v, one sum in `dtype`.

    Where blocks are keys there are too few tiles of them to fill a device: each head of a group gets its own, in fp32.
    """
    split = group // band.run(group)
    dtype = torch.float32 if split > 1 else dtype
    return k.new_empty(split, *k.shape, dtype=dtype), v.new_empty(split, *v.shape, dtype=dtype)


def keys(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    documents: Documents, band: Band,
) -> None:  # fmt: skip
    """Puts the gradients of k and v into what `room` made. Arguments as in `queries`."""
    m, groups, e = k.shape
    if m == 0:
        return
    shape, how = _shape(q, k, v, band), (BLOCKS if band.keyed_by_block else KEYS)[kind(q, v)]
    run = shift.shape[2]
    bq, bn = how.queries(run), how.columns
    _backward_keys[m // bn + documents.count, groups * len(dk)](
        *boxes(q, bq, run), *columns(k, bn), columns(v, bn)[0], boxes(do, bq, run)[0], stretches(shift, bq * run),
        stretches(delta, bq * run), dk, dv, documents.tokens, _keys(documents, band), documents.count,
        e**-0.5 * LOG2E, k.stride(1), v.stride(1), groups, shift.shape[1], dk.stride(0), **shape, GS=run, BQ=bq,
        BN=bn, **how.options,
    )  # fmt: skip


def total(sums: Tensor) -> Tensor:
    """Of what `keys` put there."""
    return sums[0] if len(sums) == 1 else sums.sum(0)
