"""Which selection blocks a query takes: scores of Eq. 9 and 10, and the best of them (Eq. 11).

Scores are summed over the heads of a group tile by tile, so that probabilities [.., T, T / d] are never in memory; the
sums per selection block are, for some thousands of queries at a time. The blocks that are always near, `local` of them
ending with the query's own, are attended to as a band: what is chosen here are the n - local others. Nothing is chosen
for queries that see no more blocks than n: their band has them all.
"""

from bisect import bisect_right

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.schema import Attention
from nsa.memory import everything
from nsa.tiles import LOG2E, Documents, Launch, columns, halves, locate, precision

SCORE = {2: Launch(64, 128, 4, 2), 4: Launch(64, 64, 8, 1)}  # by bytes of an element; rows are queries of one head
CHOOSE = Launch(1, 0, 1, 1)
RUN = 8  # blocks whose maximum is compared first, where there are many: fewer where a row has no 64 such runs
SCORE_BYTES = 2**28  # of the scores that are in memory at once
NONE = 2**31 - 1  # the key of no block, after all others in order


@triton.jit(do_not_specialize=["documents", "first_tile", "n"])
def _score(
    q, q_rest, k, k_rest, lse, scores, tokens, blocks, documents, scale, first_tile, n, width, q_h, k_h,
    G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LOCAL: tl.constexpr, ALL: tl.constexpr,
    BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """scores [tile, h_kv, BQ, width] of one tile of queries and BN // R - 1 selection blocks, for one KV head.

    R compression blocks start in a selection block. The last of them reach into the next one: so the tile starts R
    columns early, and what those reach over with goes to their neighbour. Of blocks that are always near none are made.
    """
    J: tl.constexpr = BN // R
    local, group = tl.program_id(1), tl.program_id(2)
    document, start, length, place = locate(first_tile + local, tokens, documents, BQ)
    first = tl.program_id(0) * (J - 1) - 1  # a block that only its neighbour hears of
    last = tl.minimum(place + BQ, length) - 1
    if (place >= length) | (last < ALL) | (first + 1 > last // (R * D) - LOCAL):
        return
    t = place + tl.arange(0, BQ)
    there = t < length
    base = tl.load(blocks + document) + first * R
    k1 = k.load([base, group * k_h]).T
    k2 = k1
    if E2 > 0:
        k2 = k_rest.load([base, group * k_h + E]).T
    total = tl.zeros([BQ, BN], tl.float32)
    log = lse + group.to(tl.int64) * G * n + start + t
    row, at = start + place, group * G * q_h
    shift = tl.load(log, mask=there, other=0.0)
    for h in tl.range(0, G):
        s = tl.dot(q.load([row, at + h * q_h]), k1, input_precision=EXACT)
        if E2 > 0:
            s = tl.dot(q_rest.load([row, at + h * q_h + E]), k2, s, input_precision=EXACT)
        log += n  # one head ahead: nothing waits for it
        ahead = tl.load(log, mask=there & (h + 1 < G), other=0.0)
        total += tl.exp2(s * scale - shift[:, None])
        shift = ahead
    column = tl.arange(0, BN)
    high = tl.maximum(t + 1 + D - L, 0) // D - first * R  # as many of the tile's columns end at or before t
    total = tl.where((column >= -first * R)[None, :] & (column[None, :] < high[:, None]), total, 0.0)
    cell = column % R  # where in its selection block a compression block starts
    inside = tl.minimum(R - cell, L // D)
    own = tl.sum(tl.reshape(total * inside.to(tl.float32)[None, :], [BQ, J, R]), 2)
    over = tl.sum(tl.reshape(total * (L // D - inside).to(tl.float32)[None, :], [BQ, J, R]), 2)
    j = tl.arange(0, J)
    sums = own + tl.gather(over, tl.broadcast_to(tl.maximum(j - 1, 0)[None, :], [BQ, J]), 1)
    row = ((local * tl.num_programs(2) + group) * BQ + tl.arange(0, BQ)).to(tl.int64)
    out = scores + row[:, None] * width + (first + j)[None, :]
    tl.store(out, sums, mask=there[:, None] & (j > 0)[None, :] & (first + j < width)[None, :])


@triton.jit
def _best(rank, index, COUNT: tl.constexpr, P: tl.constexpr):
    """[rows, P] of the COUNT highest ranks [rows, w], each above all before it: their indices, -1 for ranks below 0.

    Among equals the smaller index goes first; no index appears twice in a row.
    """
    NEVER: tl.constexpr = 0x7FFFFFFF
    slot = tl.arange(0, P)
    best = tl.zeros([rank.shape[0], P], tl.int32) - 1
    for i in tl.static_range(COUNT):
        top = tl.max(rank, 1)
        found = tl.min(tl.where(rank == top[:, None], index, NEVER), 1)
        best = tl.where((slot == i)[None, :] & (top >= 0)[:, None], found[:, None], best)
        rank = tl.where(index == found[:, None], -1, rank)
    return best


@triton.jit
def _rank(scores, block, initial, far):
    """The bits of scores, which order as they do for they are at least 0; -1 for blocks that are not to be ranked."""
    open_ = (block >= initial) & (block < far)
    return tl.where(open_, tl.load(scores + block, mask=open_, other=0.0).to(tl.int32, bitcast=True), -1)


@triton.jit(do_not_specialize=["documents", "first_tile", "all_blocks"])
def _choose(
    scores, keys, tokens, documents, first_tile, width, all_blocks,
    SLC: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, ALL: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    BQ: tl.constexpr, BR: tl.constexpr, W: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """keys [n, h_kv, R]: the picks of BR queries for one KV head, each a KV head and a block of the pack in one.

    The first INITIAL blocks are taken as they are. The best of the others are among the M blocks in a run of each of
    the runs with the highest maxima, as many runs as blocks are wanted: ranks are compared run by run, then in these.
    """
    local, group, groups = tl.program_id(0) // (BQ // BR), tl.program_id(1), tl.num_programs(1)
    document, start, length, place = locate(first_tile + local, tokens, documents, BQ)
    skip = tl.program_id(0) % (BQ // BR) * BR
    if place + skip >= length:
        return
    t = place + skip + tl.arange(0, BR)
    far = tl.where((t >= ALL) & (t < length), t // SLC - LOCAL + 1, 0)  # blocks before this one are to be chosen from
    at = scores + ((local * groups + group) * BQ + skip + tl.arange(0, BR)).to(tl.int64) * width
    COUNT: tl.constexpr = R - INITIAL
    if M == 1:
        block = tl.arange(0, W)[None, :]
        best = _best(_rank(at[:, None], block, INITIAL, far[:, None]), block, COUNT, P)
    else:
        run = tl.arange(0, W // M)[None, :]
        part = (run * M)[:, :, None] + tl.arange(0, 4)[None, None, :]
        top = tl.max(_rank(at[:, None, None], part, INITIAL, far[:, None, None]), 2)
        for i in tl.static_range(4, M, 4):  # 16 bytes a thread at a time
            top = tl.maximum(top, tl.max(_rank(at[:, None, None], part + i, INITIAL, far[:, None, None]), 2))
        block = (_best(top, run, COUNT, P) * M)[:, :, None] + tl.arange(0, M)[None, None, :]  # below 0 for no run
        rank = _rank(at[:, None, None], block, INITIAL, far[:, None, None])
        best = _best(tl.reshape(rank, [BR, P * M]), tl.reshape(block, [BR, P * M]), COUNT, P)
    token = start + t
    base = group * all_blocks + start // SLC + document
    out = keys + ((token.to(tl.int64) * groups + group) * R)[:, None]
    slot = tl.arange(0, P)[None, :]
    there = (t < length)[:, None]
    if INITIAL > 0:
        forced = tl.arange(0, triton.next_power_of_2(INITIAL))[None, :]
        key = tl.where(forced < far[:, None], base + forced, 0x7FFFFFFF)
        tl.store(out + forced, key, mask=there & (forced < INITIAL))
    tl.store(out + INITIAL + slot, tl.where(best >= 0, base + best, 0x7FFFFFFF), mask=there & (slot < COUNT))


def choose(q: Tensor, k: Tensor, lse: Tensor, documents: Documents, sizes: Attention) -> Tensor:
    """keys [n, h_kv, n_picks] int32 of the blocks chosen for each query beyond the local ones, best first.

    q [n, h, dk], compressed keys k [m, h_kv, dk], and the contiguous log-sum-exp [h, n, 1] of q over k. A key is
    KV head * blocks + block, where a document's block 0 is start // l_slc + document; NONE where a query has fewer.
    Those among the first `everything` tokens of their document have none.
    """
    n = len(q)
    groups, picks = k.shape[1], sizes.n - sizes.local
    keys = torch.empty(n, groups, picks, dtype=torch.int32, device=q.device)
    if picks == 0:
        return keys
    bq = SCORE[q.element_size()].rows
    tiles, tile = documents.tiles(bq), 0

    def width(count: int) -> int:
        """Blocks that the next `count` tiles of queries see; a multiple of 16 so that rows are aligned."""
        return triton.cdiv(min(documents.longest, (tile + count) * bq), sizes.l_slc * 16) * 16

    while tile < tiles:
        counts, row = range(1, tiles - tile + 1), groups * bq * 4
        count = max(1, bisect_right(counts, SCORE_BYTES, key=lambda c: c * row * width(c)))
        new = torch.zeros if len(k) == 0 else torch.empty
        scores = new(count, groups, bq, width(count), dtype=torch.float32, device=q.device)
        if len(k):
            _launch_score(q, k, lse, scores, documents, sizes, tile)
        _launch_choose(scores, keys, documents, sizes, tile)
        tile += count
    return keys


def _launch_score(
    q: Tensor, k: Tensor, lse: Tensor, scores: Tensor, documents: Documents, sizes: Attention, tile: int
) -> None:
    how, r = SCORE[q.element_size()], sizes.l_slc // sizes.d
    e, e2 = halves(q.shape[2])
    count, groups, bq, width = scores.shape
    bn = max(how.columns, 2 * r)
    options = how.options | {"num_warps": how.warps * bn // how.columns}
    _score[triton.cdiv(width, bn // r - 1), count, groups](
        *columns(q, bq), *columns(k, bn), lse, scores, documents.tokens, documents.blocks, documents.count,
        q.shape[2] ** -0.5 * LOG2E, tile, len(q), width, q.stride(1), k.stride(1),
        G=q.shape[1] // groups, E=e, E2=e2, L=sizes.l, D=sizes.d, R=r, LOCAL=sizes.local, ALL=everything(sizes),
        BQ=bq, BN=bn, EXACT=precision(q), **options,
    )  # fmt: skip


def _launch_choose(scores: Tensor, keys: Tensor, documents: Documents, sizes: Attention, tile: int) -> None:
    count, groups, bq, width = scores.shape
    picks, w = keys.shape[2], triton.next_power_of_2(width)
    _choose[count * (bq // CHOOSE.rows), groups](
        scores, keys, documents.tokens, documents.count, tile, width, documents.tiles(sizes.l_slc),
        SLC=sizes.l_slc, INITIAL=sizes.initial, LOCAL=sizes.local, ALL=everything(sizes),
        P=triton.next_power_of_2(max(1, picks - sizes.initial)), R=picks,
        BQ=bq, BR=CHOOSE.rows, W=w, M=min(RUN, w // 64) if w > 128 else 1, **CHOOSE.options,
    )  # fmt: skip
