"""The chosen blocks of queries gathered into visits: what a query and KV head chose of one span of adjacent blocks.

A visit leaves one partial output, however many blocks it has, and writing and reading these is what attention to chosen
blocks spends its time on. The visits of a span are sorted by their blocks and cut into tiles, so that a tile goes
through few blocks besides those that all of it chose: in the order of a Gray code, where one set of blocks follows
another that differs by one.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.memory import CHUNK
from nsa.score import NONE
from nsa.tiles import Documents, locate

WIDEST = 32  # blocks of a span: the bits of a mask
SPANS = 12  # of the blocks that a chunk's last query sees: its choices, 13 by default, often meet in one of these
DIGIT = 5  # bits of the place of a block in a span
DIGITS = 3  # blocks of a visit that it is sorted by where a key has no room for all
NARROW, WIDE = 2**16 - 2, 2**31 - 1  # keys that there are beside the highest, of 16 and 32 bits; 16 sort faster
LAST = 2**30  # beside the bits of visits: a tile's last block
HEAD = 3  # numbers of a plan's row before its visits
GATHER = 8  # (query, KV head) of a program
PLAN = 4  # tiles of a program


@dataclass(frozen=True)
class Visits:
    """All visits in order of (chunk, KV head, span, blocks)."""

    order: Tensor  # [n * h_kv * most] int64: which visit, (token * h_kv + KV head) * most + its place there
    masks: Tensor  # [n * h_kv * most] int32, by visit: a bit for each block of the span
    counts: Tensor  # [n, h_kv] int32: visits of a query and KV head
    starts: Tensor  # [chunks * h_kv * spans + 1] int32: where in order the visits of a span start
    most: int  # visits of a query and KV head
    spans: int  # of a chunk and KV head, the empty ones included


@triton.jit
def _code(mask, span, bits, DIGIT: tl.constexpr, DIGITS: tl.constexpr):
    """What sets of blocks are sorted by, in so many bits: their ranks in the Gray code, or else their first blocks."""
    if span <= bits:
        code = mask
        for i in tl.static_range(5):  # each bit becomes the sum of those above it and its own
            code ^= code >> (1 << i)
    else:
        code, rest, place = tl.zeros_like(mask), mask, tl.zeros_like(mask)
        for _ in tl.static_range(DIGITS):  # the next bit's place is the exponent of what it is worth
            bit = (rest & -rest).to(tl.float32).to(tl.int32, bitcast=True) >> 23 & 255
            place = tl.where(rest != 0, bit - 127, place)
            code, rest = code << DIGIT | place, rest & (rest - 1)
    return code


@triton.jit(do_not_specialize=["first", "end", "chunk", "span", "blocks", "spans", "bits", "low"])
def _gather(
    chosen, keys, masks, counts, first, end, chunk, span, blocks, spans, bits, low,
    GROUPS: tl.constexpr, PICKS: tl.constexpr, INITIAL: tl.constexpr, NONE: tl.constexpr, DIGIT: tl.constexpr,
    DIGITS: tl.constexpr, P: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The visits of BR rows (query, KV head), their keys from `low` on by place and then by their blocks."""
    MOST: tl.constexpr = PICKS - INITIAL
    row, pick = first + tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, P)
    at, group = (row.to(tl.int64) * PICKS + INITIAL)[:, None], (row % GROUPS)[:, None]
    real = (row < end)[:, None] & (pick < MOST)[None, :]
    x = tl.load(chosen + at + pick[None, :], mask=real, other=NONE)
    place = (x - group * blocks) // span
    leads, mask = x != NONE, tl.zeros([BR, P], tl.int32)
    for i in tl.static_range(MOST):
        y = tl.load(chosen + at + i, mask=(row < end)[:, None], other=NONE)
        together = (y != NONE) & ((y - group * blocks) // span == place)
        mask |= tl.where(together, 1 << (y - group * blocks) % span, 0)
        leads &= (together & (y < x)) == 0
    key = (((chunk * GROUPS + group) * spans + place) << bits) + _code(mask, span, bits, DIGIT, DIGITS) + low
    slot, count = tl.cumsum(leads.to(tl.int32), 1) - 1, tl.sum(leads.to(tl.int32), 1)
    to = (row.to(tl.int64) * MOST)[:, None]
    last = 2 ** (keys.dtype.element_ty.primitive_bitwidth - 1) - 1
    tl.store(keys + to + slot, key, mask=leads)
    tl.store(masks + to + slot, mask, mask=leads)
    tl.store(keys + to + pick[None, :], last, mask=real & (pick[None, :] >= count[:, None]))
    tl.store(counts + row, count, mask=row < end)


@triton.jit
def tiles_of(starts, chunk, spans, GROUPS: tl.constexpr, BM: tl.constexpr):
    """Tiles of a chunk, the empty ones included."""
    at = starts + chunk * GROUPS * spans
    return tl.load(at + GROUPS * spans) // BM - tl.load(at) // BM + GROUPS * spans


@triton.jit(do_not_specialize=["documents", "chunk", "span", "spans"])
def _plan(
    order, masks, starts, plan, taken, tokens, documents, chunk, span, spans,
    GROUPS: tl.constexpr, SLC: tl.constexpr, WIDEST: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
    LAST: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Of `plan` BT tiles of BM visits."""
    if tl.program_id(0) == 0:
        tl.store(taken, 0)
    tile = tl.program_id(0) * BT + tl.arange(0, BT)
    tiles = tiles_of(starts, chunk, spans, GROUPS, BM)
    if tl.program_id(0) * BT >= tiles:
        return
    starts += chunk * GROUPS * spans
    place, first, length, inside = locate(tile + tl.load(starts) // BM, starts, GROUPS * spans, BM)
    there = tl.where(tile < tiles, tl.minimum(length - inside, BM), 0)
    row, visit, bit = plan + tile * WIDTH, tl.arange(0, BP)[None, :], tl.arange(0, WIDEST)[None, :]
    at = order + (first + inside)[:, None] + tl.minimum(visit, there[:, None] - 1)  # past the end the last one again
    which = tl.load(at, mask=there[:, None] > 0, other=0).to(tl.int32)
    mask = tl.load(masks + which, mask=visit < there[:, None], other=0)
    who = tl.sum((mask[:, :, None] >> bit[:, None, :] & 1) << visit[:, :, None], 1)
    some, inner = who != 0, (tile < tiles)[:, None]
    _, start, _, offset = locate((place % spans * span)[:, None] + bit, tokens, documents, SLC)
    tl.store(row, tl.sum(some.to(tl.int32), 1), mask=tile < tiles)
    tl.store(row + 1, there, mask=tile < tiles)
    tl.store(row + 2, place // spans, mask=tile < tiles)
    tl.store(row[:, None] + HEAD + visit, which, mask=(visit < BM) & inner)
    to = row[:, None] + HEAD + BM + 2 * (tl.cumsum(some.to(tl.int32), 1) - 1)
    tl.store(to, start + offset, mask=some)
    last = tl.max(tl.where(some, bit, -1), 1)[:, None]
    tl.store(to + 1, who | tl.where(bit == last, LAST, 0), mask=some)


def span(chunk: int, documents: Documents, slc: int) -> int:
    """Blocks of a span in a chunk."""
    return max(1, min(WIDEST, min(documents.longest, (chunk + 1) * CHUNK) // slc // SPANS))


def _key(places: int, widest: int) -> tuple[torch.dtype, int, int]:
    """Of keys their kind, the lowest one, and how many bits beside the place are left for the blocks of a span."""
    if places << widest <= NARROW:
        return torch.int16, -(2**15), widest
    return torch.int32, 0, (WIDE // places).bit_length() - 1


def gather(chosen: Tensor, documents: Documents, initial: int, slc: int) -> Visits:
    """The visits of chosen [n, h_kv, picks] from `score.choose` but its first `initial`."""
    n, groups, picks = chosen.shape
    chunks, blocks, most = triton.cdiv(n, CHUNK), documents.tiles(slc), picks - initial
    spans = blocks // span(0, documents, slc) + 1
    places = chunks * groups * spans
    kind, low, bits = _key(places, span(chunks - 1, documents, slc))
    keys = torch.empty(n * groups * most, dtype=kind, device=chosen.device)
    masks = torch.empty_like(keys, dtype=torch.int32)
    counts = torch.empty(n, groups, dtype=torch.int32, device=chosen.device)
    for c in range(chunks):
        first, end = c * CHUNK * groups, min(n, (c + 1) * CHUNK) * groups
        _gather[(triton.cdiv(end - first, GATHER),)](
            chosen, keys, masks, counts, first, end, c, span(c, documents, slc), blocks, spans, bits, low,
            GROUPS=groups, PICKS=picks, INITIAL=initial, NONE=NONE, DIGIT=DIGIT, DIGITS=min(DIGITS, bits // DIGIT),
            P=triton.next_power_of_2(most), BR=GATHER, num_warps=4,
        )  # fmt: skip
    keys, order = torch.sort(keys, stable=True)
    every = torch.arange(low, low + (places << bits) + 1, 1 << bits, dtype=kind, device=chosen.device)
    return Visits(order, masks, counts, torch.searchsorted(keys, every, out_int32=True), most, spans)


def plan(visits: Visits, documents: Documents, chunk: int, n: int, slc: int, size: int) -> Tensor:
    """What tiles of `size` visits of a chunk go through: [tiles + 1, numbers] int32.

    Of each the number of its blocks (0 for an empty tile) and of its visits, and its KV head; from HEAD on its visits,
    and then for each block the token where it starts and a bit for each visit that chose it, LAST beside those of the
    last block. A 0 follows, for programs to count the tiles that are taken.
    """
    groups = visits.counts.shape[1]
    count = min(CHUNK, n - chunk * CHUNK) * groups * visits.most
    tiles = triton.cdiv(count, size) + groups * visits.spans
    width = triton.cdiv(HEAD + size + 2 * WIDEST, 4) * 4  # 16 bytes: what is aligned otherwise is compiled anew
    out = torch.empty(tiles + 1, width, dtype=torch.int32, device=visits.order.device)
    _plan[(triton.cdiv(tiles, PLAN),)](
        visits.order, visits.masks, visits.starts, out, out[-1], documents.tokens, documents.count, chunk,
        span(chunk, documents, slc), visits.spans,
        GROUPS=groups, SLC=slc, WIDEST=WIDEST, HEAD=HEAD, WIDTH=width, LAST=LAST, BM=size,
        BP=triton.next_power_of_2(size), BT=PLAN, num_warps=1,
    )  # fmt: skip
    return out
