"""Gradients of attention to the chosen blocks for GPUs with a copy engine and warpgroup products (sm_90), in Gluon.

For what `hopper_picked` takes. A tile of pairs (query, chosen block) goes from warpgroup to warpgroup, so that each has
registers for its part alone and all multiply at once: two, in turns, make the softmax and its gradient (one does where
heads are wide), one sums the gradients of a block's keys and values, one makes each pair's part of dq. Of three warps
one has the copy engine gather tiles and fetch blocks, one looks up the statistics of rows, one has it scatter dq. A
program stays and goes from run to run of `picked`'s pairs.
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

from nsa.hopper import BARRIERS, BN, ROWS, SHARED, Widths, boxes, columns, multiprocessors, read, tell, write
from nsa.memory import BACK_RUN
from nsa.pairs import Pairs
from nsa.tiles import LOG2E, Documents, halves, locate


@dataclass(frozen=True)
class Sizes(Widths):
    """What the kernel is compiled for."""

    GROUPS: int
    PICKS: int
    EACH: int  # pairs of a tile
    RUN: int  # pairs of a run
    TEAMS: int  # warpgroups that make weights
    STAGES: int  # tiles of pairs on their way
    BARS: int  # barriers for these: each is always of one team, which so misses no phase of it


@gluon.jit
def _run(item, work, C: gl.constexpr):
    """[begin, end) of the pairs of a run, the first key of its chunk and KV head, and the KV head."""
    pairs, chunk, blocks, runs = work
    starts = pairs[2]
    group = item // runs
    key0 = (chunk * C.GROUPS + group) * blocks
    begin = gl.load(starts + key0) + item % runs * C.RUN
    return begin, gl.minimum(begin + C.RUN, gl.load(starts + key0 + blocks)), key0, group


@gluon.jit
def _stretch(i, end, work):
    """The key of the pairs from i on, and where these end."""
    keys, _, starts = work[0]
    key = gl.load(keys + i)
    return key, gl.minimum(end, gl.load(starts + key + 1))


@gluon.jit
def _pairs(j, stop, work, C: gl.constexpr):
    """The pairs of the tile at j, asked for all at once; the last one stands for those that are missing."""
    order = work[0][1]
    found = (gl.load(order + j),)
    for p in gl.static_range(1, gl.constexpr(C.EACH)):
        found += (gl.load(order + gl.minimum(j + p, stop - 1)),)
    return found


@gluon.jit
def _load(source, tokens, documents, slots, work, memory, bars, C: gl.constexpr):
    """What the warp does that loads tiles and blocks. It says where a tile is the last one of a stretch: the place of
    the stretch's sums and 1, otherwise 0, and -1 after all tiles."""
    q, q_rest, do, k, k_rest, v, k_h, v_h = source
    q_at, q2_at, do_at, k_at, k2_at, v_at = memory[:6]
    says, of_block = memory[11:13]
    ready, empty, block_ready, block_empty = bars[:4]
    runs = work[3]
    turn, block, item = 0, 0, gl.program_id(0)
    while item < runs * C.GROUPS:
        i, end, key0, group = _run(item, work, C)
        while i < end:
            key, stop = _stretch(i, end, work)
            _document, start, _length, place = locate(key - key0, tokens, documents, BN)
            b = block % 2
            bar = block_ready.index(b)
            mbarrier.wait(block_empty.index(b), block // 2 & 1 ^ 1)
            mbarrier.expect(bar, BN * (C.E + C.E2 + C.F) * 2)
            tma.async_copy_global_to_shared(k, [start + place, group * k_h], bar, k_at.index(b))
            if C.E2 > 0:
                tma.async_copy_global_to_shared(k_rest, [start + place, group * k_h + C.E], bar, k2_at.index(b))
            tma.async_copy_global_to_shared(v, [start + place, group * v_h], bar, v_at.index(b))
            slot = group * slots + item % runs + key - key0  # run and block both only grow: no other stretch has it
            for j in range(i, stop, C.EACH):
                pairs = _pairs(j, stop, work, C)
                stage, bar = turn % C.STAGES, ready.index(turn % C.BARS)
                mbarrier.wait(empty.index(stage), turn // C.STAGES & 1 ^ 1)
                write(says.index(stage), gl.where(j + C.EACH >= stop, slot + 1, 0))
                write(of_block.index(stage), block)
                mbarrier.expect(bar, ROWS * (C.E + C.E2 + C.F) * 2)
                for p in gl.static_range(gl.constexpr(C.EACH)):
                    row = (pairs[p] // (C.GROUPS * C.PICKS) * C.GROUPS + group) * C.G
                    tma.async_copy_global_to_shared(q, [row, 0], bar, q_at.index(stage).slice(p * C.G, C.G))
                    if C.E2 > 0:
                        to = q2_at.index(stage).slice(p * C.G, C.G)
                        tma.async_copy_global_to_shared(q_rest, [row, C.E], bar, to)
                    tma.async_copy_global_to_shared(do, [row, 0], bar, do_at.index(stage).slice(p * C.G, C.G))
                turn += 1
            i = stop
            block += 1
        item += gl.num_programs(0)
    for i in gl.static_range(gl.constexpr(C.TEAMS)):
        stage = (turn + i) % C.STAGES
        mbarrier.wait(empty.index(stage), (turn + i) // C.STAGES & 1 ^ 1)
        write(says.index(stage), item * 0 - 1)
        mbarrier.arrive(ready.index((turn + i) % C.BARS), count=1)


@gluon.jit
def _look_up(shift, delta, room, work, memory, bars, C: gl.constexpr):
    """What the warp does that loads the statistics of a tile's rows; a row without a pair weighs nothing."""
    shift_at, delta_at = memory[9:11]
    ready, empty = bars[:2]
    order, runs = work[0][1], work[3]
    row = gl.arange(0, ROWS, layout=gl.BlockedLayout([2], [32], [1], [0]))
    turn, item = 0, gl.program_id(0)
    while item < runs * C.GROUPS:
        i, end, _key0, group = _run(item, work, C)
        while i < end:
            _key, stop = _stretch(i, end, work)
            for j in range(i, stop, C.EACH):
                at = j + row // C.G
                pair = gl.load(order + gl.minimum(at, stop - 1))
                where = (group * room + pair // (C.GROUPS * C.PICKS)) * C.G + row % C.G
                off = gl.load(shift + where, mask=at < stop, other=float("inf"))
                drop = gl.load(delta + where, mask=at < stop, other=0.0)
                stage = turn % C.STAGES
                mbarrier.wait(empty.index(stage), turn // C.STAGES & 1 ^ 1)
                shift_at.index(stage).store(off)
                delta_at.index(stage).store(drop)
                tell(ready.index(turn % C.BARS))
                turn += 1
            i = stop
        item += gl.num_programs(0)
    for i in gl.static_range(gl.constexpr(C.TEAMS)):
        stage = (turn + i) % C.STAGES
        mbarrier.wait(empty.index(stage), (turn + i) // C.STAGES & 1 ^ 1)
        mbarrier.arrive(ready.index((turn + i) % C.BARS), count=1)


@gluon.jit
def _store(dq, dq_rest, base, ends, work, memory, bars, C: gl.constexpr):
    """What the warp does that stores parts of dq."""
    out_at, out2_at = memory[13:]
    out_ready, out_empty = bars[6:]
    runs = work[3]
    turn, item = 0, gl.program_id(0)
    while item < runs * C.GROUPS:
        i, end, _key0, _group = _run(item, work, C)
        while i < end:
            _key, stop = _stretch(i, end, work)
            for j in range(i, stop, C.EACH):
                pairs = _pairs(j, stop, work, C)
                mbarrier.wait(out_ready, turn & 1)
                for p in gl.static_range(gl.constexpr(C.EACH)):
                    at = gl.where(j + p < stop, (pairs[p] - base) * C.G, ends)
                    tma.async_copy_shared_to_global(dq, [at, 0], out_at.slice(p * C.G, C.G))
                    if C.E2 > 0:
                        tma.async_copy_shared_to_global(dq_rest, [at, C.E], out2_at.slice(p * C.G, C.G))
                tma.store_wait(0)
                mbarrier.arrive(out_empty, count=1)
                turn += 1
            i = stop
        item += gl.num_programs(0)


@gluon.jit
def _weigh(team: gl.constexpr, scale, memory, bars, C: gl.constexpr):
    """What a warpgroup does that makes the softmax p of its tiles, every TEAMS-th one, and its gradient ds."""
    q_at, q2_at, do_at, k_at, k2_at, v_at, p_at, ds_at, said, shift_at, delta_at, says, of_block = memory[:13]
    ready, _empty, block_ready, _block_empty, made, used = bars[:6]
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    rows: gl.constexpr = gl.SliceLayout(1, sums)
    turn = gl.program_id(0) * 0 + team
    note = turn * 0
    while note >= 0:
        stage = turn % C.STAGES
        mbarrier.wait(ready.index(turn % C.BARS), turn // C.BARS & 1)
        note = read(says.index(stage))
        if note >= 0:
            block = read(of_block.index(stage))
            b = block % 2
            mbarrier.wait(block_ready.index(b), block // 2 & 1)
            none = gl.zeros([ROWS, BN], gl.float32, sums)
            s = warpgroup_mma(q_at.index(stage), k_at.index(b).permute((1, 0)), none, use_acc=False, is_async=True)
            if C.E2 > 0:
                s = warpgroup_mma(q2_at.index(stage), k2_at.index(b).permute((1, 0)), s, is_async=True)
            dp = warpgroup_mma(do_at.index(stage), v_at.index(b).permute((1, 0)), none, use_acc=False, is_async=True)
            off, drop = shift_at.index(stage).load(rows), delta_at.index(stage).load(rows)
            s = warpgroup_mma_wait(1, [s])
            p = gl.exp2(s * scale - off[:, None])
            dp = warpgroup_mma_wait(0, [dp])
            ds = p * (dp - drop[:, None])
            mbarrier.wait(used.index(team), turn // C.TEAMS & 1 ^ 1)
            p_at.index(team).store(p.to(p_at.dtype))
            ds_at.index(team).store(ds.to(ds_at.dtype))
        else:
            mbarrier.wait(used.index(team), turn // C.TEAMS & 1 ^ 1)
        write(said.index(team), note)
        fence_async_shared()
        tell(made.index(team))
        turn += C.TEAMS


@gluon.jit
def _put(to, slot, width, first, sums):
    """Stores the sums [keys, channels] of a stretch, from the first of these channels on."""
    layout: gl.constexpr = sums.type.layout
    row = slot.to(gl.int64) * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
    channel = first + gl.arange(0, sums.shape[1], layout=gl.SliceLayout(0, layout))
    gl.store(to + (row * width)[:, None] + channel[None, :], sums)


@gluon.jit
def _sum_keys(dk, dv, memory, bars, C: gl.constexpr):
    """What the warpgroup does that sums dk = ds^T q and dv = p^T do of a stretch."""
    q_at, q2_at, do_at = memory[:3]
    p_at, ds_at, said = memory[6:9]
    empty, made, used = bars[1], bars[4], bars[5]
    E: gl.constexpr = C.E
    E2: gl.constexpr = C.E2
    F: gl.constexpr = C.F
    firsts: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    rests: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    dk1, dk2 = gl.zeros([BN, E], gl.float32, firsts), gl.zeros([BN, 64], gl.float32, rests)
    dv1 = gl.zeros([BN, F], gl.float32, outs)
    turn = 0
    mbarrier.wait(made.index(0), 0)
    note = read(said.index(0))
    while note >= 0:
        stage, slot = turn % C.STAGES, turn % C.TEAMS
        p, ds = p_at.index(slot).permute((1, 0)), ds_at.index(slot).permute((1, 0))
        dv1 = warpgroup_mma(p, do_at.index(stage), dv1, is_async=True)
        dk1 = warpgroup_mma(ds, q_at.index(stage), dk1, is_async=True)
        if E2 > 0:
            dk2 = warpgroup_mma(ds, q2_at.index(stage), dk2, is_async=True)
            dv1, dk1, dk2 = warpgroup_mma_wait(0, [dv1, dk1, dk2])
        else:
            dv1, dk1 = warpgroup_mma_wait(0, [dv1, dk1])
        tell(empty.index(stage))
        mbarrier.arrive(used.index(slot), count=1)
        if note > 0:
            _put(dk, note - 1, E + E2, 0, dk1)
            if E2 > 0:
                _put(dk, note - 1, E + E2, E, dk2)
            _put(dv, note - 1, F, 0, dv1)
            dk1, dk2 = gl.zeros([BN, E], gl.float32, firsts), gl.zeros([BN, 64], gl.float32, rests)
            dv1 = gl.zeros([BN, F], gl.float32, outs)
        turn += 1
        mbarrier.wait(made.index(turn % C.TEAMS), turn // C.TEAMS & 1)
        note = read(said.index(turn % C.TEAMS))


@gluon.jit
def _make_queries(memory, bars, C: gl.constexpr):
    """What the warpgroup does that makes parts of dq = ds k."""
    k_at, k2_at = memory[3:5]
    ds_at, said = memory[7:9]
    out_at, out2_at = memory[13:]
    block_empty, made, used, out_ready, out_empty = bars[3:]
    E: gl.constexpr = C.E
    firsts: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, E, 16])
    rests: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    turn, block = 0, 0
    mbarrier.wait(made.index(0), 0)
    note = read(said.index(0))
    while note >= 0:
        slot, b = turn % C.TEAMS, block % 2
        dq1 = gl.zeros([ROWS, E], gl.float32, firsts)
        dq1 = warpgroup_mma(ds_at.index(slot), k_at.index(b), dq1, use_acc=False, is_async=True)
        if C.E2 > 0:
            dq2 = gl.zeros([ROWS, 64], gl.float32, rests)
            dq2 = warpgroup_mma(ds_at.index(slot), k2_at.index(b), dq2, use_acc=False, is_async=True)
            dq1, dq2 = warpgroup_mma_wait(0, [dq1, dq2])
        else:
            dq1 = warpgroup_mma_wait(0, [dq1])
        tell(used.index(slot))
        if note > 0:
            mbarrier.arrive(block_empty.index(b), count=1)
            block += 1
        mbarrier.wait(out_empty, turn & 1 ^ 1)
        out_at.store(dq1.to(out_at.dtype))
        if C.E2 > 0:
            out2_at.store(dq2.to(out_at.dtype))
        fence_async_shared()
        tell(out_ready)
        turn += 1
        mbarrier.wait(made.index(turn % C.TEAMS), turn // C.TEAMS & 1)
        note = read(said.index(turn % C.TEAMS))


@gluon.jit(do_not_specialize=["documents", "chunk", "base", "runs", "ends"])
def _backward(
    q, q_rest, do, k, k_rest, v, k_h, v_h, shift, delta, room, dq, dq_rest, dk, dv, keys, order, starts, tokens,
    documents, scale, chunk, base, blocks, runs, slots, ends, C: gl.constexpr,
):  # fmt: skip
    """Of `differentiate` one program, with q [n * h, dk], do [n * h, dv] and dq [pairs * G, dk] in boxes."""
    panels: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STAGES: gl.constexpr = C.STAGES
    TEAMS: gl.constexpr = C.TEAMS
    E: gl.constexpr = C.E
    E2: gl.constexpr = C.E2
    F: gl.constexpr = C.F
    q_at = gl.allocate_shared_memory(q.dtype, [STAGES, ROWS, E], panels)
    k_at = gl.allocate_shared_memory(q.dtype, [2, BN, E], panels)
    out_at = gl.allocate_shared_memory(q.dtype, [ROWS, E], panels)
    q2_at, k2_at, out2_at = q_at, k_at, out_at
    if E2 > 0:
        q2_at = gl.allocate_shared_memory(q.dtype, [STAGES, ROWS, E2], panels)
        k2_at = gl.allocate_shared_memory(q.dtype, [2, BN, E2], panels)
        out2_at = gl.allocate_shared_memory(q.dtype, [ROWS, E2], panels)
    do_at = gl.allocate_shared_memory(q.dtype, [STAGES, ROWS, F], panels)
    v_at = gl.allocate_shared_memory(q.dtype, [2, BN, F], panels)
    p_at = gl.allocate_shared_memory(q.dtype, [TEAMS, ROWS, BN], panels)
    ds_at = gl.allocate_shared_memory(q.dtype, [TEAMS, ROWS, BN], panels)
    number: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shift_at = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], number)
    delta_at = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], number)
    says = gl.allocate_shared_memory(gl.int32, [STAGES, 1], number)
    of_block = gl.allocate_shared_memory(gl.int32, [STAGES, 1], number)
    said = gl.allocate_shared_memory(gl.int32, [TEAMS, 1], number)
    ready = gl.allocate_shared_memory(gl.int64, [C.BARS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    block_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    block_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    used = gl.allocate_shared_memory(gl.int64, [TEAMS, 1], mbarrier.MBarrierLayout())
    out_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    out_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(gl.constexpr(C.BARS)):
        mbarrier.init(ready.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(block_ready.index(i), count=1)
        mbarrier.init(block_empty.index(i), count=1)
    for i in gl.static_range(TEAMS):
        mbarrier.init(made.index(i), count=1)
        mbarrier.init(used.index(i), count=2)
    mbarrier.init(out_ready, count=1)
    mbarrier.init(out_empty, count=1)
    memory = (
        q_at, q2_at, do_at, k_at, k2_at, v_at, p_at, ds_at, said, shift_at, delta_at, says, of_block, out_at, out2_at
    )  # fmt: skip
    bars = (ready, empty, block_ready, block_empty, made, used, out_ready, out_empty)
    work = ((keys, order, starts), chunk, blocks, runs)
    source = (q, q_rest, do, k, k_rest, v, k_h, v_h)
    if TEAMS == 2:
        gl.warp_specialize(
            [
                (_weigh, (0, scale, memory, bars, C)),
                (_weigh, (1, scale, memory, bars, C)),
                (_sum_keys, (dk, dv, memory, bars, C)),
                (_make_queries, (memory, bars, C)),
                (_load, (source, tokens, documents, slots, work, memory, bars, C)),
                (_look_up, (shift, delta, room, work, memory, bars, C)),
                (_store, (dq, dq_rest, base, ends, work, memory, bars, C)),
            ],
            [4, 4, 4, 1, 1, 1],
            [96, 160, 96, 32, 32, 32],
        )
    else:
        gl.warp_specialize(
            [
                (_weigh, (0, scale, memory, bars, C)),
                (_sum_keys, (dk, dv, memory, bars, C)),
                (_make_queries, (memory, bars, C)),
                (_load, (source, tokens, documents, slots, work, memory, bars, C)),
                (_look_up, (shift, delta, room, work, memory, bars, C)),
                (_store, (dq, dq_rest, base, ends, work, memory, bars, C)),
            ],
            [4, 4, 1, 1, 1],
            [216, 136, 24, 24, 24],
        )


def differentiate(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, shift: Tensor, delta: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    pairs: Pairs, documents: Documents, chunk: int,
) -> None:  # fmt: skip
    """As `picked.differentiate`; q [n, h, dk] and do [n, h, dv] are contiguous."""
    (n, heads, e), (_, groups, f), (_, slots, slc, _) = q.shape, v.shape, dk.shape
    g, (e1, e2), (size, _, picks, *_) = heads // groups, halves(e), dq.shape
    count = min(size, n - chunk * size)
    rows, keys, teams = ROWS.value, BN.value, 1 if e2 else 2  # of wide heads two have not enough registers
    free = SHARED - BARRIERS - 2 * keys * (e + f) * 2 - 2 * teams * rows * keys * 2 - rows * e * 2
    stages = min(4, free // (rows * ((e + f) * 2 + 8)))
    c = Sizes(
        E=e1, E2=e2, F=f, G=g, GROUPS=groups, PICKS=picks, EACH=rows // g, RUN=BACK_RUN, TEAMS=teams, STAGES=stages,
        BARS=stages * teams,
    )  # fmt: skip
    runs = -(-count * picks // BACK_RUN)
    q_boxes, dq_boxes = boxes(q.view(-1, e), g), boxes(dq.view(-1, e), g)
    _backward[(min(multiprocessors(q.device), runs * groups),)](
        *q_boxes, boxes(do.view(-1, f), g)[0], *columns(k, slc), columns(v, slc)[0], k.stride(1), v.stride(1),
        shift, delta, shift.shape[1], *dq_boxes, dk, dv, pairs.keys, pairs.order, pairs.starts, documents.tokens,
        documents.count, e**-0.5 * LOG2E, chunk, chunk * size * groups * picks, documents.tiles(slc), runs, slots,
        dq.numel() // e, c, num_warps=4, maxnreg=96 if teams == 2 else 128,
    )  # fmt: skip
