"""Which selection blocks a query takes: scores of Eq. 9 and 10, and the best of them (Eq. 11).

Scores are summed over the heads of a group tile by tile, so that probabilities [.., T, T / d] are never in memory; the
sums per selection block are, for some thousands of queries at a time. The blocks that are always near, `local` of them
ending with the query's own, are attended to as a band: what is chosen here are the n - local others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from configs.schema import Attention
from nsa.tiles import LOG2E, Documents, Launch, boxes, halves, locate, precision

SCORE = {2: Launch(64, 64, 4, 3), 4: Launch(64, 64, 8, 1)}  # by bytes of an element; rows are queries of one head
CHOOSE = Launch(1, 0, 1, 1)
CHUNK = 64  # tiles whose scores are in memory at once
NONE = 2**31 - 1  # the key of no block, after all others in order


@triton.jit(do_not_specialize=["documents"])
def _score(
    q, q_rest, k, k_rest, lse, scores, tokens, blocks, documents, scale, first_tile, n, width,
    G: tl.constexpr, E: tl.constexpr, E2: tl.constexpr,
    L: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """scores [tile, h_kv, BQ, width] of one tile of queries and BN // R - 1 selection blocks, for one KV head.

    R compression blocks start in a selection block. The last of them reach into the next one: so the tile starts R
    columns early, and what those reach over with goes to their neighbour.
    """
    J: tl.constexpr = BN // R
    local, group = tl.program_id(1), tl.program_id(2)
    document, start, length, place = locate(first_tile + local, tokens, documents, BQ)
    if place >= length:
        return
    block = tl.program_id(0) * (J - 1) - 1 + tl.arange(0, J)
    if (tl.program_id(0) * (J - 1)) * R * D > tl.minimum(place + BQ, length) - 1:
        return
    t = place + tl.arange(0, BQ)
    there = t < length
    column = (tl.program_id(0) * (J - 1) - 1) * R + tl.arange(0, BN)
    high = tl.maximum(t + 1 + D - L, 0) // D
    last = tl.max(tl.where(there, high, 0), 0)
    real = (column >= 0) & (column < last)
    base = tl.load(blocks + document) + (tl.program_id(0) * (J - 1) - 1) * R
    k1 = k.load([base, group, 0]).reshape(BN, E)
    if E2 > 0:
        k2 = k_rest.load([base, group, E]).reshape(BN, E2)
    at = lse + group * G * n + start + t
    total = tl.zeros([BQ, BN], tl.float32)
    for h in tl.range(0, G):
        q1 = q.load([start + place, group * G + h, 0]).reshape(BQ, E)
        shift = tl.load(at + h * n, mask=there, other=float("inf"))
        s = tl.dot(q1, k1.T, input_precision=EXACT)
        if E2 > 0:
            s = tl.dot(q_rest.load([start + place, group * G + h, E]).reshape(BQ, E2), k2.T, s, input_precision=EXACT)
        total += tl.exp2(s * scale - shift[:, None])
    total = tl.where(real[None, :] & (column[None, :] < high[:, None]), total, 0.0)
    cell = tl.arange(0, BN) % R  # where in its selection block a compression block starts
    inside = tl.minimum(R - cell, L // D)
    own = tl.sum(tl.reshape(total * inside.to(tl.float32)[None, :], [BQ, J, R]), 2)
    over = tl.sum(tl.reshape(total * (L // D - inside).to(tl.float32)[None, :], [BQ, J, R]), 2)
    j = tl.arange(0, J)
    before = tl.broadcast_to(tl.maximum(j - 1, 0)[None, :], [BQ, J])
    sums = own + tl.gather(over, before, 1)
    row = (local * tl.num_programs(2) + group) * BQ + tl.arange(0, BQ)
    out = scores + row.to(tl.int64)[:, None] * width + block[None, :]
    tl.store(out, sums, mask=there[:, None] & (j > 0)[None, :] & (block < width)[None, :])


@triton.jit(do_not_specialize=["documents"])
def _choose(
    scores, keys, tokens, documents, first_tile, width, chunk_tokens, all_blocks,
    SLC: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    BQ: tl.constexpr, BR: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """keys [n, h_kv, P]: the picks of BR queries for one KV head, each (chunk, KV head, block of the pack) in one."""
    local, group, groups = tl.program_id(0) // (BQ // BR), tl.program_id(1), tl.num_programs(1)
    document, start, length, place = locate(first_tile + local, tokens, documents, BQ)
    at = tl.program_id(0) % (BQ // BR) * BR + tl.arange(0, BR)
    if place + tl.program_id(0) % (BQ // BR) * BR >= length:
        return
    t = place + at
    block = tl.arange(0, W)
    far = t // SLC - LOCAL + 1  # blocks before this one are to be chosen from
    row = (local * groups + group) * BQ + at
    open_ = (block[None, :] < far[:, None]) & (t < length)[:, None]
    score = tl.load(scores + row.to(tl.int64)[:, None] * width + block[None, :], mask=open_, other=0.0)
    # Scores are at least 0, so that their bits order as they do; among equals the smaller block is the larger number.
    bits = tl.where(block[None, :] < INITIAL, 0x7F800000, score.to(tl.int32, bitcast=True))
    rank = (bits.to(tl.int64) << 32) | (W - 1 - block)[None, :].to(tl.int64)
    rank = tl.where(open_, rank, -1)
    slot = tl.arange(0, P)
    best = tl.zeros([BR, P], tl.int32) - 1
    for i in tl.static_range(R):
        top = tl.max(rank, 1)
        found = tl.where(top >= 0, W - 1 - (top & 0xFFFFFFFF).to(tl.int32), -1)
        best = tl.where(slot[None, :] == i, found[:, None], best)
        rank = tl.where(rank == top[:, None], -1, rank)
    token = start + t
    base = (token // chunk_tokens * groups + group) * all_blocks + start // SLC + document
    key = tl.where(best >= 0, base[:, None] + best, 0x7FFFFFFF)
    out = keys + (token.to(tl.int64) * groups + group)[:, None] * R + slot[None, :]
    tl.store(out, key, mask=(t < length)[:, None] & (slot < R)[None, :])


def choose(q: Tensor, k: Tensor, lse: Tensor, documents: Documents, sizes: Attention, chunk: int) -> Tensor:
    """keys [n, h_kv, n_picks] int32 of the blocks chosen for each query beyond the local ones, best first.

    q [n, h, dk], compressed keys k [m, h_kv, dk], and the log-sum-exp [h, n, 1] of q over k. A key is
    (token // chunk * h_kv + KV head) * blocks + block, where a document's block 0 is start // l_slc + document; NONE
    where a query has fewer.
    """
    n, heads, _ = q.shape
    groups, picks = k.shape[1], sizes.n - sizes.local
    keys = torch.empty(n, groups, picks, dtype=torch.int32, device=q.device)
    if picks == 0:
        return keys
    e, e2 = halves(q.shape[2])
    r = sizes.l_slc // sizes.d
    how = SCORE[q.element_size()]
    bq, bn = how.rows, max(how.columns, 2 * r)
    tiles, blocks = documents.tiles(bq), documents.tiles(sizes.l_slc)
    for tile in range(0, tiles, CHUNK):
        count = min(CHUNK, tiles - tile)
        width = triton.cdiv(min(documents.longest, (tile + count) * bq), sizes.l_slc)  # blocks that these queries see
        w = max(16, triton.next_power_of_2(width))
        scores = (
            torch.zeros(count, groups, bq, width, dtype=torch.float32, device=q.device)
            if len(k) == 0
            else (torch.empty(count, groups, bq, width, dtype=torch.float32, device=q.device))
        )
        if len(k):
            _score[triton.cdiv(width, bn // r - 1), count, groups](
                *boxes(q, bq, 1), *boxes(k, bn, 1), lse, scores, documents.tokens, documents.blocks, documents.count,
                q.shape[2] ** -0.5 * LOG2E, tile, lse.stride(1), lse.stride(0), width,
                G=heads // groups, E=e, E2=e2, L=sizes.l, D=sizes.d, R=r, BQ=bq, BN=bn, EXACT=precision(q),
                **how.options,
            )  # fmt: skip
        _choose[count * (bq // CHOOSE.rows), groups](
            scores, keys, documents.tokens, documents.count, tile, width, chunk, blocks,
            SLC=sizes.l_slc, INITIAL=sizes.initial, LOCAL=sizes.local, P=triton.next_power_of_2(picks), R=picks,
            BQ=bq, BR=CHOOSE.rows, W=w, **CHOOSE.options,
        )  # fmt: skip
    return keys
