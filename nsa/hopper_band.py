"""Attention to a band of keys for GPUs with a copy engine and warpgroup products (sm_90), in Gluon.

It does what `band.forward` does, for 16-bit heads of 64 and 128 channels, or 192 with values of 128, and groups of 8 to
64 heads. One warp keeps the next keys and values on their way; some warpgroups compute, each for queries of its own, so
that one multiplies while another takes exponentials, and keys come to a multiprocessor once for all of them. A program
stays and takes tile after tile, one branch after the other. For each of these queries are loaded anew, ahead of time,
into one of two places, where outputs then take theirs: nothing waits for memory between branches and tiles.
"""

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from configs.schema import Attention, Branch
from nsa.bands import SHORT_BAND, bands, beyond, edges, lowest, tile_at
from nsa.hopper import BARRIERS, BN, ROWS, SHARED, TEAMS, Widths, boxes, columns, multiprocessors, takes, tell
from nsa.memory import everything
from nsa.tiles import LOG2E, Documents, halves, locate

NAMES = [b.value for b in Branch]


@dataclass(frozen=True)
class Sizes(Widths):
    """What the kernel is compiled for."""

    L: int
    D: int
    A: int  # tokens of a selection block
    LOCAL: int
    ALL: int  # first tokens that slc sees whole
    SINK: int  # first tokens that slc sees
    W: int
    THERE: int  # a bit for each branch that is there
    COUNT: int  # of them
    BQ: int  # queries of a tile
    STAGES: int  # tiles of keys and values on their way


@gluon.jit
def _place(item, tokens, documents, groups, tiles, C: gl.constexpr):
    """(document, its first token, its length, the place in it, KV head) of a tile of queries: the longest first."""
    document, start, length, place = locate(tiles - 1 - item // groups, tokens, documents, C.BQ)
    return document, start, length, place, item % groups


@gluon.jit
def _low(t, branch, C: gl.constexpr):
    """The first key that a query at t sees, in any branch."""
    return gl.where(branch == 0, 0, gl.where(branch == 1, lowest(t, C.A, C.LOCAL, C.ALL), lowest(t, 1, C.W, 0)))


@gluon.jit
def _high(t, branch, C: gl.constexpr):
    """The first key that it sees no more."""
    return gl.where(branch == 0, beyond(t, C.L, C.D), t + 1)


@gluon.jit
def _tiles(branch, place, length, C: gl.constexpr):
    """The tiles of keys of a tile of queries, as `_key` takes them, and their number: at least one, seen or not."""
    last = gl.minimum(place + C.BQ, length) - 1
    low, low_last = _low(place, branch, C), _low(last, branch, C)
    short = (branch == 1) & (C.A * C.LOCAL <= SHORT_BAND * BN) | (branch == 2) & (C.W <= SHORT_BAND * BN)
    seen = low, low_last, _high(place, branch, C), _high(last, branch, C)
    lefts, left, whole, inner, rights = edges(*seen, short, BN)
    sinks = gl.where(branch == 1, (gl.minimum(low_last, C.SINK) + BN - 1) // BN, 0)
    return (whole, left, sinks, low, lefts, inner), gl.maximum(whole + sinks + lefts + rights, 1)


@gluon.jit
def _key(i, tiles, C: gl.constexpr):
    """The first key of a tile of keys."""
    whole, left, sinks, low, lefts, inner = tiles
    return gl.where(i < whole, left + i * BN, tile_at(i - whole, sinks, low, lefts, inner, BN))


@gluon.jit
def _load_band(
    k, k_rest, v, k_at, k2_at, v_at, ready, empty, turn, branch, base, k_h, v_h, place, length, C: gl.constexpr
):
    """Loads a branch's keys of tile i together with its values of the tile before, which are multiplied then."""
    tiles, count = _tiles(branch, place, length, C)
    for i in range(count + 1):
        slot = turn % C.STAGES
        bar = ready.index(slot)
        mbarrier.wait(empty.index(slot), turn // C.STAGES & 1 ^ 1)
        if i == 0:
            mbarrier.expect(bar, BN * (C.E + C.E2) * 2)
        elif i == count:
            mbarrier.expect(bar, BN * C.F * 2)
        else:
            mbarrier.expect(bar, BN * (C.E + C.E2 + C.F) * 2)
        if i > 0:
            tma.async_copy_global_to_shared(v, [base + _key(i - 1, tiles, C), v_h], bar, v_at.index(slot))
        if i < count:
            key = base + _key(i, tiles, C)
            tma.async_copy_global_to_shared(k, [key, k_h], bar, k_at.index(slot))
            if C.E2 > 0:
                tma.async_copy_global_to_shared(k_rest, [key, k_h + C.E], bar, k2_at.index(slot))
        turn += 1
    return turn


@gluon.jit
def _load_queries(q, q_rest, tokens, documents, heads, tiles, memory, bars, C: gl.constexpr):
    """What the warp does that loads queries, for each branch anew."""
    q_at, q2_at = memory[:2]
    q_ready, q_empty = bars[2], bars[4]
    groups = heads // C.G
    EACH: gl.constexpr = ROWS // C.G
    item, done = gl.program_id(0), 0
    while item < tiles * groups:
        _document, start, length, place, group = _place(item, tokens, documents, groups, tiles, C)
        if place < length:
            for _ in range(C.COUNT):
                slot = done % 2
                bar = q_ready.index(slot)
                mbarrier.wait(q_empty.index(slot), done // 2 & 1 ^ 1)
                mbarrier.expect(bar, TEAMS * ROWS * (C.E + C.E2) * 2)
                for i in gl.static_range(gl.constexpr(C.BQ)):
                    row, team = (start + place + i) * heads + group * C.G, slot * TEAMS + i // EACH
                    tma.async_copy_global_to_shared(q, [row, 0], bar, q_at.index(team).slice(i % EACH * C.G, C.G))
                    if C.E2 > 0:
                        to = q2_at.index(team).slice(i % EACH * C.G, C.G)
                        tma.async_copy_global_to_shared(q_rest, [row, C.E], bar, to)
                done += 1
        item += gl.num_programs(0)


@gluon.jit
def _load(kv, strides, tokens, blocks, documents, heads, tiles, memory, bars, C: gl.constexpr):
    """What the warp does that loads keys and values."""
    k1, k1_rest, v1, k2, k2_rest, v2, k3, k3_rest, v3 = kv
    k1_h, v1_h, k2_h, v2_h, k3_h, v3_h = strides
    k_at, k2_at, v_at = memory[2:]
    ready, empty = bars[:2]
    groups = heads // C.G
    turn, item = 0, gl.program_id(0)
    while item < tiles * groups:
        document, start, length, place, group = _place(item, tokens, documents, groups, tiles, C)
        if place < length:
            if C.THERE & 1:
                turn = _load_band(
                    k1, k1_rest, v1, k_at, k2_at, v_at, ready, empty, turn, 0, gl.load(blocks + document),
                    group * k1_h, group * v1_h, place, length, C,
                )  # fmt: skip
            if C.THERE & 2:
                turn = _load_band(
                    k2, k2_rest, v2, k_at, k2_at, v_at, ready, empty, turn, 1, start, group * k2_h, group * v2_h,
                    place, length, C,
                )  # fmt: skip
            if C.THERE & 4:
                turn = _load_band(
                    k3, k3_rest, v3, k_at, k2_at, v_at, ready, empty, turn, 2, start, group * k3_h, group * v3_h,
                    place, length, C,
                )  # fmt: skip
        item += gl.num_programs(0)


@gluon.jit
def _store_branch(o, done, start, place, length, heads, head, ends, memory, bars, C: gl.constexpr):
    """Stores what takes the place of queries, nothing of it past the document's end."""
    q_at = memory[0]
    o_ready, q_empty = bars[3:]
    EACH: gl.constexpr = ROWS // C.G
    slot = done % 2
    mbarrier.wait(o_ready.index(slot), done // 2 & 1)
    for i in gl.static_range(gl.constexpr(C.BQ)):
        row = gl.where(place + i < length, (start + place + i) * heads + head, ends)
        tma.async_copy_shared_to_global(o, [row, 0], q_at.index(slot * TEAMS + i // EACH).slice(i % EACH * C.G, C.G))
    tma.store_wait(0)
    mbarrier.arrive(q_empty.index(slot), count=1)
    return done + 1


@gluon.jit
def _store(o1, o2, o3, tokens, documents, heads, tiles, ends, memory, bars, C: gl.constexpr):
    """What the warp does that stores."""
    groups = heads // C.G
    item, done = gl.program_id(0), 0
    while item < tiles * groups:
        _document, start, length, place, group = _place(item, tokens, documents, groups, tiles, C)
        if place < length:
            if C.THERE & 1:
                done = _store_branch(o1, done, start, place, length, heads, group * C.G, ends, memory, bars, C)
            if C.THERE & 2:
                done = _store_branch(o2, done, start, place, length, heads, group * C.G, ends, memory, bars, C)
            if C.THERE & 4:
                done = _store_branch(o3, done, start, place, length, heads, group * C.G, ends, memory, bars, C)
        item += gl.num_programs(0)


@gluon.jit
def _scores(at, slot, s, memory, C: gl.constexpr):
    """Starts s = q k^T."""
    q_at, q2_at, k_at, k2_at = memory[:4]
    s = warpgroup_mma(q_at.index(at), k_at.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    if C.E2 > 0:
        s = warpgroup_mma(q2_at.index(at), k2_at.index(slot).permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _weigh(s, i, peak, total, scale, t, branch, tiles, dtype: gl.constexpr, C: gl.constexpr):
    """A step of online softmax: the weights of tile i, what outputs so far shrink by, and the statistics."""
    whole, sinks = tiles[0], tiles[2]
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.F, 16])
    if i >= whole:
        column = _key(i, tiles, C) + gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
        at_start = i < whole + sinks
        low, high = _low(t, branch, C), _high(t, branch, C)
        sink = gl.minimum(low, C.SINK)
        begin, end = gl.where(at_start, 0, low), gl.where(at_start, sink, high)
        seen = (column[None, :] >= begin[:, None]) & (column[None, :] < end[:, None])
        s = gl.where(seen, s, float("-inf"))
    top = gl.maximum(peak, gl.max(s, 1) * scale)
    ground = gl.where(top == float("-inf"), 0.0, top)
    p = gl.exp2(s * scale - ground[:, None])
    shrink = gl.exp2(peak - ground)
    total = total * shrink + gl.sum(p, 1)
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, outs))[:, None]
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, outs, 2)), shrink, top, total


@gluon.jit
def _attend(team: gl.constexpr, at, branch, turn, place, length, scale, memory, bars, C: gl.constexpr):
    """Softmax of a warpgroup's rows over one branch's keys: output, base-2 log-sum-exp (+inf without a key), turn."""
    v_at = memory[4]
    ready, empty = bars[0], bars[1]
    F: gl.constexpr = C.F
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    tiles, count = _tiles(branch, place, length, C)
    t = place + team * (ROWS // C.G) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums)) // C.G
    acc = gl.zeros([ROWS, F], gl.float32, outs)
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, sums))
    peak = total - float("inf")
    slot = turn % C.STAGES
    mbarrier.wait(ready.index(slot), turn // C.STAGES & 1)
    s = _scores(at, slot, gl.zeros([ROWS, BN], gl.float32, sums), memory, C)
    s = warpgroup_mma_wait(0, [s])
    tell(empty.index(slot))
    p, _, peak, total = _weigh(s, 0, peak, total, scale, t, branch, tiles, v_at.dtype, C)
    for i in range(1, count):  # the values of a tile with the keys of the next: two products at once
        slot = (turn + i) % C.STAGES
        mbarrier.wait(ready.index(slot), (turn + i) // C.STAGES & 1)
        s = _scores(at, slot, s, memory, C)
        acc = warpgroup_mma(p, v_at.index(slot), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s])  # softmax of these scores beside the product with values
        weights, shrink, peak, total = _weigh(s, i, peak, total, scale, t, branch, tiles, v_at.dtype, C)
        if C.E2 > 0:  # A loop, though done: ptxas takes no exponential after it. Narrower heads gain nothing.
            mbarrier.wait(ready.index(slot), (turn + i) // C.STAGES & 1)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        tell(empty.index(slot))
        acc *= shrink
        p = weights
    turn += count
    slot = turn % C.STAGES
    mbarrier.wait(ready.index(slot), turn // C.STAGES & 1)
    acc = warpgroup_mma(p, v_at.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    tell(empty.index(slot))
    some = total > 0
    total = gl.where(some, total, 1.0)
    share = gl.where(some, 1.0 / total, 0.0)
    acc *= gl.convert_layout(share, gl.SliceLayout(1, outs))[:, None]
    return acc, gl.where(some, peak + gl.log2(total), float("inf")), turn + 1


@gluon.jit
def _note(lse1, lse2, lse3, branch, log, team: gl.constexpr, start, place, length, n, head, C: gl.constexpr):
    """Stores a branch's statistics: of cmp those of a head side by side, of the others those of a group's heads."""
    lse = lse1
    if branch == 1:
        lse = lse2
    elif branch == 2:
        lse = lse3
    to_head, to_token = gl.where(branch == 0, n, 1), gl.where(branch == 0, 1, C.G)
    row = gl.arange(0, ROWS, layout=log.type.layout)
    t = place + team * (ROWS // C.G) + row // C.G
    gl.store(lse + head * n + (start + t) * to_token + row % C.G * to_head, log, mask=t < length)


@gluon.jit
def _compute(
    team: gl.constexpr, lse1, lse2, lse3, tokens, documents, n, heads, tiles, scale, memory, bars, C: gl.constexpr
):
    """What a warpgroup does. All branches go through the same code: three times as much is too much for its cache."""
    q_at = memory[0]
    q_ready, o_ready = bars[2:4]
    groups = heads // C.G
    turn, item, done = 0, gl.program_id(0), 0
    while item < tiles * groups:
        _document, start, length, place, group = _place(item, tokens, documents, groups, tiles, C)
        if place < length:
            head = group * C.G
            for branch in range(3):
                if C.THERE >> branch & 1:
                    slot = done % 2
                    at = slot * TEAMS + team
                    mbarrier.wait(q_ready.index(slot), done // 2 & 1)
                    acc, log, turn = _attend(team, at, branch, turn, place, length, scale, memory, bars, C)
                    q_at.index(at).store(acc.to(q_at.dtype))
                    fence_async_shared()
                    tell(o_ready.index(slot))
                    done += 1
                    _note(lse1, lse2, lse3, branch, log, team, start, place, length, n, head, C)
        item += gl.num_programs(0)


@gluon.jit(do_not_specialize=["documents", "n", "tiles", "ends"])
def _forward(
    q, q_rest, k1, k1_rest, v1, o1, lse1, k2, k2_rest, v2, o2, lse2, k3, k3_rest, v3, o3, lse3,
    k1_h, v1_h, k2_h, v2_h, k3_h, v3_h, tokens, blocks, documents, scale, n, heads, tiles, ends, C: gl.constexpr,
):  # fmt: skip
    """As `band._forward`, with q [n * h, dk] and o [n * h, dv] in boxes of the heads of one query and KV head."""
    panels: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STAGES: gl.constexpr = C.STAGES
    E: gl.constexpr = C.E
    E2: gl.constexpr = C.E2
    F: gl.constexpr = C.F
    q_at = gl.allocate_shared_memory(q.dtype, [2 * TEAMS, ROWS, E], panels)
    k_at = gl.allocate_shared_memory(q.dtype, [STAGES, BN, E], panels)
    q2_at, k2_at = q_at, k_at
    if E2 > 0:
        q2_at = gl.allocate_shared_memory(q.dtype, [2 * TEAMS, ROWS, E2], panels)
        k2_at = gl.allocate_shared_memory(q.dtype, [STAGES, BN, E2], panels)
    v_at = gl.allocate_shared_memory(q.dtype, [STAGES, BN, F], panels)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    o_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=TEAMS)
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(o_ready.index(i), count=TEAMS)
        mbarrier.init(q_empty.index(i), count=1)
    memory = (q_at, q2_at, k_at, k2_at, v_at)
    bars = (ready, empty, q_ready, o_ready, q_empty)
    kv = (k1, k1_rest, v1, k2, k2_rest, v2, k3, k3_rest, v3)
    strides = (k1_h, v1_h, k2_h, v2_h, k3_h, v3_h)
    gl.warp_specialize(
        [
            (_compute, (0, lse1, lse2, lse3, tokens, documents, n, heads, tiles, scale, memory, bars, C)),
            (_compute, (1, lse1, lse2, lse3, tokens, documents, n, heads, tiles, scale, memory, bars, C)),
            (_compute, (2, lse1, lse2, lse3, tokens, documents, n, heads, tiles, scale, memory, bars, C)),
            (_load, (kv, strides, tokens, blocks, documents, heads, tiles, memory, bars, C)),
            (_load_queries, (q, q_rest, tokens, documents, heads, tiles, memory, bars, C)),
            (_store, (o1, o2, o3, tokens, documents, heads, tiles, ends, memory, bars, C)),
        ],
        [4, 4, 1, 1, 1],
        [160, 160, 24, 24, 24],
    )


def fits(q: Tensor, v: Tensor, group: int) -> bool:
    """Whether `forward` can have q [n, h, dk] and v [n, h_kv, dv] with so many heads to a KV head."""
    return takes(q, v) and 8 <= group <= ROWS.value


def forward(q: Tensor, kv: dict, out: dict, documents: Documents, sizes: Attention) -> None:
    """As `band.forward`, into its `out`; q is contiguous, and kv has the branches that have keys."""
    n, heads, e = q.shape
    key, value = next(iter(kv.values()))
    groups, f, (e1, e2), rows = key.shape[1], value.shape[2], halves(e), TEAMS.value * ROWS.value
    g = heads // groups
    bq, tiles = rows // g, documents.tiles(rows // g)
    tensors, strides = [], []
    for name in NAMES:
        name = name if name in kv else next(iter(kv))
        (k, v), (o, lse) = kv[name], out[name]
        tensors += [*columns(k, BN.value), columns(v, BN.value)[0], boxes(o.view(-1, f), g)[0], lse]
        strides += [k.stride(1), v.stride(1)]
    c = Sizes(
        E=e1, E2=e2, F=f, G=g, L=sizes.l, D=sizes.d, A=sizes.l_slc, LOCAL=sizes.local, ALL=everything(sizes),
        SINK=sizes.initial * sizes.l_slc, W=bands(sizes)["win"].N,
        THERE=sum(1 << i for i, name in enumerate(NAMES) if name in kv), COUNT=len(kv),
        BQ=bq, STAGES=min(8, (SHARED - BARRIERS - 2 * rows * e * 2) // (BN.value * (e + f) * 2)),
    )  # fmt: skip
    programs = min(multiprocessors(q.device), tiles * groups)
    _forward[(programs,)](
        *boxes(q.view(-1, e), g), *tensors, *strides, documents.tokens, documents.blocks, documents.count,
        e**-0.5 * LOG2E, n, heads, tiles, n * heads, c, num_warps=4, maxnreg=128,
    )  # fmt: skip
