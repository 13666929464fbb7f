"""Attention to the chosen blocks, block by block: one is read once for a run of queries that chose it.

The pairs (query, chosen block) of a chunk of queries are sorted by block and cut into runs of equal length, one for a
program: however many queries choose a block, the work is even. A program gathers its queries a tile at a time and
leaves for each pair a softmax over that block alone; a merge then joins a query's parts, and the branches. On GPUs of
sm_90 a part is a visit (visits.py), of several blocks. Backward leaves for each pair a part of dq, and for each stretch
of a run in one block a part of dk and dv, on GPUs of sm_90 by a kernel of its own (hopper_picked_backward.py).
Everything is summed in a fixed order. A chunk bounds what is held at once.
Chosen blocks are whole and lie before the query: nothing is masked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.schema import Attention
from nsa import hopper_picked, hopper_picked_backward, visits
from nsa.beside import Beside
from nsa.memory import BACK_RUN, CHUNK
from nsa.pairs import RUN, Pairs, sort
from nsa.score import NONE
from nsa.tiles import LOG2E, Documents, Launch, columns, halves, kind, locate, precision

FORWARD = Launch(64, 0, 4, 1)  # a tile's keys are one block
BACKWARD = {  # by `tiles.kind`
    "narrow": Launch(128, 0, 4, 2), "middle": Launch(64, 0, 4, 2), "wide": Launch(32, 0, 4, 2),
    "fp32": Launch(32, 0, 8, 1),
}  # fmt: skip


@triton.jit
def _run(starts, key, blocks, RUN: tl.constexpr):
    """[begin, end) of this program's run of the pairs of the chunk and KV head whose first key is `key`."""
    begin = tl.load(starts + key) + tl.program_id(0) * RUN
    return begin, tl.minimum(begin + RUN, tl.load(starts + key + blocks))


@triton.jit(do_not_specialize=["documents", "chunk", "first"])
def _attend(
    q, k, k_rest, v, o, lse, keys, order, starts, tokens, documents, scale, chunk, first, blocks, q_t, q_h, k_h, v_h,
    G: tl.constexpr, GROUPS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    PICKS: tl.constexpr, INITIAL: tl.constexpr, SLC: tl.constexpr,
    BM: tl.constexpr, RUN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of `attend` a run of pairs."""
    group = tl.program_id(1)
    key0 = (chunk * GROUPS + group) * blocks
    i, end = _run(starts, key0, blocks, RUN)
    row, e, f = tl.arange(0, BM * G), tl.arange(0, E), tl.arange(0, F)
    q += group * G * q_h
    while i < end:
        key = tl.load(keys + i)
        stop = tl.minimum(end, tl.load(starts + key + 1))
        _, start, _, place = locate(key - key0, tokens, documents, SLC)
        i = tl.where(place < INITIAL * SLC, stop, i)  # those were attended to with the local blocks
        k1 = k.load([start + place, group * k_h])
        if E2 > 0:
            k2 = k_rest.load([start + place, group * k_h + E])
        values = v.load([start + place, group * v_h])
        for j in tl.range(i, stop, BM):
            there = j + row // G < stop
            pair = tl.load(order + j + row // G, mask=there, other=0)
            token = pair // (GROUPS * PICKS)
            at_q = q + token.to(tl.int64) * q_t + row % G * q_h
            q1 = tl.load(at_q[:, None] + e[None, :], mask=there[:, None], other=0.0, eviction_policy="evict_last")
            s = tl.dot(q1, k1.T, input_precision=EXACT)
            if E2 > 0:
                q2 = tl.load(at_q[:, None] + E + tl.arange(0, E2)[None, :], mask=there[:, None], other=0.0)
                s = tl.dot(q2, k2.T, s, input_precision=EXACT)
            peak = tl.max(s, 1) * scale
            p = tl.exp2(s * scale - peak[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(values.dtype), values, input_precision=EXACT) * (1.0 / total)[:, None]
            at_o = (pair - first * (GROUPS * PICKS)) * G + row % G
            tl.store(lse + at_o, peak + tl.log2(total), mask=there)
            to_o = (o + at_o.to(tl.int64) * F)[:, None] + f[None, :]
            tl.store(to_o, out.to(o.dtype.element_ty), mask=there[:, None], eviction_policy="evict_first")
        i = stop


@triton.jit(do_not_specialize=["first", "n"])
def _merge(
    ends, o_part, lse_part, o, lse, gates, o_cmp, o_win, out, first, n,
    GROUPS: tl.constexpr, PLACES: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
    BRANCHES: tl.constexpr, CMP: tl.constexpr, SLC: tl.constexpr, WIN: tl.constexpr,
):  # fmt: skip
    """Joins the parts of a query and KV head with what o and lse hold, in place, and the branches by their gates.

    CMP, SLC and WIN are the branches' places among the gates; -1 for one that is not there.
    """
    head, f, place = tl.arange(0, G), tl.arange(0, F), tl.arange(0, P)
    local, group = tl.program_id(0), tl.program_id(1)
    base = (local * GROUPS + group) * PLACES
    at = (first + local).to(tl.int64) * GROUPS + group
    end = tl.load(ends + at)
    some = (place >= FIRST) & (place < end)
    logs = tl.load(lse_part + (base + place[None, :]) * G + head[:, None], mask=some[None, :], other=float("-inf"))
    to_lse = lse + (group.to(tl.int64) * n + first + local) * G + head
    near = tl.load(to_lse)
    peak = tl.maximum(near, tl.max(logs, 1))
    whole = peak + tl.log2(tl.exp2(near - peak) + tl.sum(tl.exp2(logs - peak[:, None]), 1))
    tile = (at * G + head[:, None]) * F + f[None, :]
    acc = tl.load(o + tile).to(tl.float32) * tl.exp2(near - whole)[:, None]
    for r in tl.range(FIRST, end):
        part = (base + r) * G + head
        weight = tl.exp2(tl.load(lse_part + part) - whole)
        values = tl.load(o_part + part.to(tl.int64)[:, None] * F + f[None, :], eviction_policy="evict_first")
        acc += values.to(tl.float32) * weight[:, None]
    tl.store(to_lse, whole)
    tl.store(o + tile, acc.to(o.dtype.element_ty))
    gate = gates + (at * G + head) * BRANCHES
    acc *= tl.load(gate + SLC).to(tl.float32)[:, None]
    if CMP >= 0:
        acc += tl.load(o_cmp + tile).to(tl.float32) * tl.load(gate + CMP).to(tl.float32)[:, None]
    if WIN >= 0:
        acc += tl.load(o_win + tile).to(tl.float32) * tl.load(gate + WIN).to(tl.float32)[:, None]
    tl.store(out + tile, acc.to(out.dtype.element_ty))


def attend(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, documents: Documents, sizes: Attention,
    o: Tensor, lse: Tensor, c: int,
) -> None:  # fmt: skip
    """Attention of the pairs of chunk c, each to its block: o [chunk, h_kv, picks, h / h_kv, dv], lse without dv."""
    (n, heads, e), (_, groups, f), slc = q.shape, v.shape, sizes.l_slc
    g, (e1, e2), picks, count = heads // groups, halves(e), o.shape[2], min(CHUNK, n - c * CHUNK)
    _attend[triton.cdiv(count * picks, RUN), groups](
        q, *columns(k, slc), columns(v, slc)[0], o, lse, pairs.keys, pairs.order, pairs.starts, documents.tokens,
        documents.count, e**-0.5 * LOG2E, c, c * CHUNK, documents.tiles(slc), *q.stride()[:2], k.stride(1), v.stride(1),
        G=g, GROUPS=groups, E=e1, E2=e2, F=f, PICKS=picks, INITIAL=sizes.initial, SLC=slc, BM=FORWARD.queries(g),
        RUN=RUN, EXACT=precision(q), **FORWARD.options,
    )  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """Partial outputs of queries and KV heads, which are merged."""

    places: int  # for those of a query and KV head
    first: int  # place of them that is used
    end: Tensor  # [n, h_kv] int32: the place after the last one
    attend: Callable[[Tensor, Tensor, int], None]  # puts those of a chunk into o [chunk, h_kv, places, g, dv] and lse


def _parts(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, documents: Documents, sizes: Attention) -> Parts:
    """A part for each visit where there is a kernel for these, or for each pair."""
    picks, initial, slc = chosen.shape[2], sizes.initial, sizes.l_slc
    if picks > initial and hopper_picked.fits(q, v, slc):
        found = visits.gather(chosen, documents, initial, slc)
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # whole rows, not copied again for each chunk
        how = partial(hopper_picked.attend, q, k, v, found, documents, slc)
        return Parts(found.most, 0, found.counts, how)
    pairs = sort(chosen, CHUNK, documents.tiles(slc))
    how = partial(attend, q, k, v, pairs, documents, sizes)
    return Parts(picks, initial, (chosen != NONE).sum(2, dtype=torch.int32), how)


def forward(
    q: Tensor, k: Tensor, v: Tensor, outputs: dict[str, Tensor], lse: Tensor, gates: Tensor, chosen: Tensor,
    documents: Documents, sizes: Attention,
) -> Tensor:  # fmt: skip
    """Joins attention to the chosen blocks into outputs["slc"] [n, h, dv] and lse [h_kv, n, h / h_kv].

    These hold attention to the local blocks and to the first ones, which are not looked at again. Returns the sum of
    outputs, each times its column of gates [n, h, branches]. q [n, h, dk], k [n, h_kv, dk], v [n, h_kv, dv]; chosen is
    from `score.choose`.
    """
    n, heads, _ = q.shape
    groups, width = v.shape[1:]
    g, size = heads // groups, min(CHUNK, n)
    o, at = outputs["slc"], {name: i for i, name in enumerate(outputs)}
    parts, out = _parts(q, k, v, chosen, documents, sizes), torch.empty_like(o)
    o_part = q.new_empty(size, groups, parts.places, g, width)
    lse_part = q.new_empty(o_part.shape[:-1], dtype=torch.float32)
    for c, first in enumerate(range(0, n, CHUNK)):
        parts.attend(o_part, lse_part, c)
        _merge[min(CHUNK, n - first), groups](
            parts.end, o_part, lse_part, o, lse, gates, outputs.get("cmp", o), outputs.get("win", o), out, first, n,
            GROUPS=groups, PLACES=parts.places, P=triton.next_power_of_2(parts.places), FIRST=parts.first, G=g, F=width,
            BRANCHES=gates.shape[2], CMP=at.get("cmp", -1), SLC=at["slc"], WIN=at.get("win", -1), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["documents", "chunk"])
def _backward(
    q, k, k_rest, v, do, shift, delta, dq, dk, dv, keys, order, starts, tokens, documents, scale, chunk, blocks, base,
    q_t, q_h, k_h, v_h, do_t, do_h, room, slots,
    G: tl.constexpr, GROUPS: tl.constexpr, E: tl.constexpr, E2: tl.constexpr, F: tl.constexpr,
    PICKS: tl.constexpr, SLC: tl.constexpr, BM: tl.constexpr, RUN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of `differentiate` a run of pairs."""
    group = tl.program_id(1)
    key0 = (chunk * GROUPS + group) * blocks
    i, end = _run(starts, key0, blocks, RUN)
    row, e, f, column = tl.arange(0, BM * G), tl.arange(0, E), tl.arange(0, F), tl.arange(0, SLC)
    e2 = tl.arange(0, E2 if E2 > 0 else 1)
    head = group * G + row % G
    while i < end:
        key = tl.load(keys + i)
        stop = tl.minimum(end, tl.load(starts + key + 1))
        _, start, _, place = locate(key - key0, tokens, documents, SLC)
        k1 = k.load([start + place, group * k_h])
        k2 = k1
        dk2 = tl.zeros([SLC, E2 if E2 > 0 else 1], tl.float32)
        if E2 > 0:
            k2 = k_rest.load([start + place, group * k_h + E])
        values = v.load([start + place, group * v_h])
        dk1, dv1 = tl.zeros([SLC, E], tl.float32), tl.zeros([SLC, F], tl.float32)
        for j in tl.range(i, stop, BM):
            there = j + row // G < stop
            pair = tl.load(order + j + row // G, mask=there, other=0)
            token = (pair // (GROUPS * PICKS)).to(tl.int64)
            at_q = q + token * q_t + head * q_h
            q1 = tl.load(at_q[:, None] + e[None, :], mask=there[:, None], other=0.0)
            s = tl.dot(k1, tl.trans(q1), input_precision=EXACT)  # [keys, rows]
            if E2 > 0:
                q2 = tl.load(at_q[:, None] + E + e2[None, :], mask=there[:, None], other=0.0)
                s = tl.dot(k2, tl.trans(q2), s, input_precision=EXACT)
            g_out = tl.load((do + token * do_t + head * do_h)[:, None] + f[None, :], mask=there[:, None], other=0.0)
            at_s = (group * room + pair // (GROUPS * PICKS)) * G + row % G
            off = tl.load(shift + at_s, mask=there, other=float("inf"))
            drop = tl.load(delta + at_s, mask=there, other=0.0)
            p = tl.exp2(s * scale - off[None, :])
            dv1 = tl.dot(p.to(g_out.dtype), g_out, dv1, input_precision=EXACT)
            dp = tl.dot(values, tl.trans(g_out), input_precision=EXACT)
            ds = (p * (dp - drop[None, :])).to(q1.dtype)
            dk1 = tl.dot(ds, q1, dk1, input_precision=EXACT)
            back = tl.trans(ds)
            at_o = dq + ((pair - base) * G + row % G).to(tl.int64) * (E + E2)
            part = tl.dot(back, k1, input_precision=EXACT)
            to = at_o[:, None] + e[None, :]
            tl.store(to, part.to(dq.dtype.element_ty), mask=there[:, None], eviction_policy="evict_first")
            if E2 > 0:
                dk2 = tl.dot(ds, q2, dk2, input_precision=EXACT)
                part = tl.dot(back, k2, input_precision=EXACT)
                tl.store(at_o[:, None] + E + e2[None, :], part.to(dq.dtype.element_ty), mask=there[:, None])
        # Run and block both only grow: their sum is a slot that no other stretch has.
        slot = (group * slots + tl.program_id(0) + key - key0).to(tl.int64) * SLC + column
        tl.store((dk + slot * (E + E2))[:, None] + e[None, :], dk1, eviction_policy="evict_first")
        if E2 > 0:
            tl.store((dk + slot * (E + E2))[:, None] + E + e2[None, :], dk2)
        tl.store((dv + slot * F)[:, None] + f[None, :], dv1, eviction_policy="evict_first")
        i = stop


@triton.jit
def _merge_queries(
    chosen, part, dq, first, n, groups, scale, PICKS: tl.constexpr, NONE: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, W: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Adds to dq the parts of BT queries of one KV head."""
    row, e = tl.arange(0, BT * G), tl.arange(0, W)
    local, group = tl.program_id(0) * BT + row // G, tl.program_id(1)
    there = first + local < n
    pair = (local * groups + group).to(tl.int64) * PICKS
    at = ((first + local) * groups + group).to(tl.int64)
    acc = tl.zeros([BT * G, W], tl.float32)
    for r in tl.range(0, PICKS):
        some = there & (tl.load(chosen + at * PICKS + r, mask=there, other=NONE) != NONE)
        at_p = part + ((pair + r) * G + row % G) * E
        acc += tl.load(at_p[:, None] + e[None, :], mask=some[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    out = (dq + (at * G + row % G) * E)[:, None] + e[None, :]
    mask = there[:, None] & (e < E)[None, :]
    acc = acc * scale + tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, acc.to(dq.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["documents", "chunk"])
def _merge_keys(
    dk_part, dv_part, dk, dv, starts, tokens, documents, chunk, scale, slots,
    E: tl.constexpr, F: tl.constexpr, W: tl.constexpr, SLC: tl.constexpr, RUN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv, in fp32, the parts of BR tokens of one block and KV head."""
    block, group, blocks, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    key = (chunk * groups + group) * blocks
    first, begin, end = tl.load(starts + key), tl.load(starts + key + block), tl.load(starts + key + block + 1)
    if begin >= end:
        return
    _, start, _, place = locate(block, tokens, documents, SLC)
    row, e, f = tl.program_id(2) * BR + tl.arange(0, BR), tl.arange(0, W), tl.arange(0, F)
    at = (start + place + row).to(tl.int64) * groups + group
    to_k, to_v = (dk + at * E)[:, None] + e[None, :], (dv + at * F)[:, None] + f[None, :]
    real = (e < E)[None, :] & (row >= 0)[:, None]
    sum_k, sum_v = tl.zeros([BR, W], tl.float32), tl.zeros([BR, F], tl.float32)
    for run in tl.range((begin - first) // RUN, (end - 1 - first) // RUN + 1):
        slot = (group * slots + run + block).to(tl.int64) * SLC + row
        sum_k += tl.load((dk_part + slot * E)[:, None] + e[None, :], mask=real, other=0.0)
        sum_v += tl.load((dv_part + slot * F)[:, None] + f[None, :])
    tl.store(to_k, tl.load(to_k, mask=real, other=0.0) + sum_k * scale, mask=real)
    tl.store(to_v, tl.load(to_v) + sum_v)


def differentiate(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    pairs: Pairs, documents: Documents, c: int,
) -> None:  # fmt: skip
    """Of chunk c each pair's dq [chunk, h_kv, picks, h / h_kv, dk], each stretch's dk [h_kv, slots, l', dk] and dv."""
    (n, heads, e), (_, groups, f), (_, slots, slc, _) = q.shape, v.shape, dk.shape
    g, (e1, e2), picks, count = heads // groups, halves(e), dq.shape[2], min(CHUNK, n - c * CHUNK)
    how = BACKWARD[kind(q, v)]
    _backward[triton.cdiv(count * picks, BACK_RUN), groups](
        q, *columns(k, slc), columns(v, slc)[0], do, shift, delta, dq, dk, dv, pairs.keys, pairs.order, pairs.starts,
        documents.tokens, documents.count, e**-0.5 * LOG2E, c, documents.tiles(slc), c * CHUNK * groups * picks,
        *q.stride()[:2], k.stride(1), v.stride(1), *do.stride()[:2], shift.shape[1], slots,
        G=g, GROUPS=groups, E=e1, E2=e2, F=f, PICKS=picks, SLC=slc, BM=how.queries(g), RUN=BACK_RUN,
        EXACT=precision(q), **how.options,
    )  # fmt: skip


def backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, chosen: Tensor, documents: Documents, sizes: Attention, near: Beside,
) -> None:  # fmt: skip
    """Adds to dq [n, h, dk] in its dtype, and to dk [n, h_kv, dk] and dv [n, h_kv, dv] in fp32, once `near` is done.

    do [n, h, dv] is the gradient of the gated output; shift and delta are the whole branch's of `gates.products`,
    chosen is from `score.choose`.
    """
    n, heads, e = q.shape
    _, groups, picks = chosen.shape
    width, g, slc = v.shape[2], heads // groups, sizes.l_slc
    size, blocks = min(CHUNK, n), documents.tiles(slc)
    pairs, one_chunk = sort(chosen, CHUNK, blocks), differentiate
    if hopper_picked.fits(q, v, slc):
        one_chunk, q, do = hopper_picked_backward.differentiate, q.contiguous(), do.contiguous()
    slots = triton.cdiv(size * picks, BACK_RUN) + blocks
    part = q.new_empty(size, groups, picks, g, e)
    dk_part = k.new_empty(groups, slots, slc, e, dtype=torch.float32)
    dv_part = v.new_empty(groups, slots, slc, width, dtype=torch.float32)
    bt, scale = max(1, 16 // g), e**-0.5
    for c, first in enumerate(range(0, n, CHUNK)):
        count = min(CHUNK, n - first)
        one_chunk(q, k, v, do, shift, delta, part, dk_part, dv_part, pairs, documents, c)
        near.wait()
        _merge_queries[triton.cdiv(count, bt), groups](
            chosen, part, dq, first, n, groups, scale,
            PICKS=picks, NONE=NONE, G=g, E=e, W=triton.next_power_of_2(e), BT=bt, num_warps=4,
        )  # fmt: skip
        _merge_keys[blocks, groups, slc // min(slc, 16)](
            dk_part, dv_part, dk, dv, pairs.starts, documents.tokens, documents.count, c, scale, slots,
            E=e, F=width, W=triton.next_power_of_2(e), SLC=slc, RUN=BACK_RUN, BR=min(slc, 16), num_warps=4,
        )  # fmt: skip
