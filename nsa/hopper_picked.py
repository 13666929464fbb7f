"""Attention to the chosen blocks for GPUs with a copy engine and warpgroup products (sm_90), in Gluon.

It is for 16-bit heads of 64 and 128 channels, or 192 with values of 128, and groups of 16 to 64 heads. A tile of
visits stays while the blocks that any of them chose come by, and softmax goes on from block to block. Some warpgroups
compute, each for visits of its own, and pass over blocks that none of these chose. One warp has the copy engine
gather queries and scatter outputs, all heads of a query at once; outputs take the place of queries in shared memory.
Another one has it fetch blocks, and a third takes tiles: a program stays and goes from tile to tile.
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

from nsa import visits
from nsa.hopper import (
    BARRIERS,
    BN,
    ROWS,
    SHARED,
    TEAMS,
    Widths,
    boxes,
    columns,
    multiprocessors,
    read,
    takes,
    tell,
    write,
)
from nsa.memory import CHUNK
from nsa.tiles import LOG2E, Documents, halves
from nsa.visits import Visits, tiles_of

AHEAD = gl.constexpr(4)  # tiles that are taken before they are needed
HEAD, LAST = gl.constexpr(visits.HEAD), gl.constexpr(visits.LAST)


@dataclass(frozen=True)
class Sizes(Widths):
    """What the kernel is compiled for."""

    GROUPS: int
    MOST: int  # visits of a query and KV head
    BM: int  # visits of a tile
    STAGES: int  # blocks on their way
    WIDTH: int  # numbers of a row of a plan


@gluon.jit
def _take(plan, taken, tiles, memory, bars, C: gl.constexpr):
    """What the warp does that takes tiles with visits, for as long as there are any. They differ in work: a program
    takes its next one when it gets to it."""
    which = memory[5]
    taken_ready, taken_empty = bars[4:]
    tile, turn = 0, 0
    while tile < tiles:
        tile = gl.atomic_add(taken, 1)
        if (tile >= tiles) | (gl.load(plan + gl.minimum(tile, tiles - 1) * C.WIDTH) > 0):
            slot = turn % AHEAD
            mbarrier.wait(taken_empty.index(slot), turn // AHEAD & 1 ^ 1)
            write(which.index(2 + slot), tile)
            mbarrier.arrive(taken_ready.index(slot), count=1)
            turn += 1


@gluon.jit
def _next(turn, tile, tiles, memory, bars):
    """The tile that was taken after `tile`; the last one that is said is past the end."""
    if tile < tiles:
        taken_ready, taken_empty = bars[4:]
        slot = turn % AHEAD
        mbarrier.wait(taken_ready.index(slot), turn // AHEAD & 1)
        tile = read(memory[5].index(2 + slot))
        mbarrier.arrive(taken_empty.index(slot), count=1)
    return tile


@gluon.jit
def _fill(q, q_rest, plan, tile, tiles, slot, memory, bars, C: gl.constexpr):
    """Starts loading the queries of a tile, and says which it is."""
    q_at, q2_at = memory[:2]
    which, bar = memory[5].index(slot), bars[0].index(slot)
    EACH: gl.constexpr = ROWS // C.G
    write(which, tile)
    if tile >= tiles:
        mbarrier.arrive(bar, count=1)
    else:
        mbarrier.expect(bar, TEAMS * ROWS * (C.E + C.E2) * 2)
        for i in gl.static_range(gl.constexpr(C.BM)):
            at = gl.load(plan + tile * C.WIDTH + HEAD + i) // C.MOST * C.G
            team = slot * TEAMS + i // EACH
            tma.async_copy_global_to_shared(q, [at, 0], bar, q_at.index(team).slice(i % EACH * C.G, C.G))
            if C.E2 > 0:
                tma.async_copy_global_to_shared(q_rest, [at, C.E], bar, q2_at.index(team).slice(i % EACH * C.G, C.G))


@gluon.jit
def _carry(q, q_rest, o, plan, tiles, first_visit, ends, memory, bars, C: gl.constexpr):
    """What the warp does that loads the queries of tiles and stores what became of them."""
    q_at, o_ready = memory[0], bars[1]
    EACH: gl.constexpr = ROWS // C.G
    tile = _next(0, gl.program_id(0) * 0, tiles, memory, bars)  # 0, but no constant: an `if` may change it
    _fill(q, q_rest, plan, tile, tiles, 0, memory, bars, C)
    after = _next(1, tile, tiles, memory, bars)
    _fill(q, q_rest, plan, after, tiles, 1, memory, bars, C)
    done = 0
    while tile < tiles:
        row, slot = plan + tile * C.WIDTH, done % 2
        size = gl.load(row + 1)
        coming = _next(done + 2, after, tiles, memory, bars)
        mbarrier.wait(o_ready.index(slot), done // 2 & 1)
        for i in gl.static_range(gl.constexpr(C.BM)):
            at = gl.where(i < size, (gl.load(row + HEAD + i) - first_visit) * C.G, ends)
            of = q_at.index(slot * TEAMS + i // EACH).slice(i % EACH * C.G, C.G)
            tma.async_copy_shared_to_global(o, [at, 0], of)
        tma.store_wait(0)
        _fill(q, q_rest, plan, coming, tiles, slot, memory, bars, C)
        done += 1
        tile, after = after, coming


@gluon.jit
def _load(k, k_rest, v, plan, tiles, memory, bars, C: gl.constexpr):
    """What the warp does that loads blocks, and says who chose them."""
    k_at, k2_at, v_at, _, chosen_by = memory[2:]
    ready, empty = bars[2:4]
    E: gl.constexpr = C.E + C.E2
    turn, done = 0, 1
    tile = _next(0, gl.program_id(0) * 0, tiles, memory, bars)
    while tile < tiles:
        row = plan + tile * C.WIDTH
        count, group = gl.load(row), gl.load(row + 2)
        for i in range(count):
            block = row + HEAD + C.BM + 2 * i
            token, who = gl.load(block), gl.load(block + 1)
            stage = turn % C.STAGES
            bar = ready.index(stage)
            mbarrier.wait(empty.index(stage), turn // C.STAGES & 1 ^ 1)
            write(chosen_by.index(stage), who)
            mbarrier.expect(bar, BN * (E + C.F) * 2)
            tma.async_copy_global_to_shared(k, [token, group * E], bar, k_at.index(stage))
            if C.E2 > 0:
                tma.async_copy_global_to_shared(k_rest, [token, group * E + C.E], bar, k2_at.index(stage))
            tma.async_copy_global_to_shared(v, [token, group * C.F], bar, v_at.index(stage))
            turn += 1
        tile = _next(done, tile, tiles, memory, bars)
        done += 1


@gluon.jit
def _compute(team: gl.constexpr, lse, plan, tiles, first_visit, scale, memory, bars, C: gl.constexpr):
    """What a warpgroup does."""
    q_at, q2_at, k_at, k2_at, v_at, which, chosen_by = memory
    q_ready, o_ready, ready, empty = bars[:4]
    EACH: gl.constexpr = ROWS // C.G
    F: gl.constexpr = C.F
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    outs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, F, 16])
    rows: gl.constexpr = gl.SliceLayout(1, sums)
    mine = team * EACH + gl.arange(0, ROWS, layout=rows) // C.G
    head = gl.arange(0, ROWS, layout=rows) % C.G
    turn, done = 0, 0
    mbarrier.wait(q_ready.index(0), 0)
    tile = read(which.index(0))
    while tile < tiles:
        row, slot = plan + tile * C.WIDTH, done % 2 * TEAMS + team
        size, visit = gl.load(row + 1), gl.load(row + HEAD + mine) - first_visit
        acc = gl.zeros([ROWS, F], gl.float32, outs)
        total = gl.zeros([ROWS], gl.float32, rows)
        peak = total - float("inf")
        more = True
        while more:
            stage = turn % C.STAGES
            mbarrier.wait(ready.index(stage), turn // C.STAGES & 1)
            who = read(chosen_by.index(stage))
            ours = who >> team * EACH & (1 << EACH) - 1
            more = who < LAST
            if ours != 0:
                s = gl.zeros([ROWS, BN], gl.float32, sums)
                k1 = k_at.index(stage).permute((1, 0))
                s = warpgroup_mma(q_at.index(slot), k1, s, use_acc=False, is_async=True)
                if C.E2 > 0:
                    k2 = k2_at.index(stage).permute((1, 0))
                    s = warpgroup_mma(q2_at.index(slot), k2, s, is_async=True)
                s = warpgroup_mma_wait(0, [s])
                chose = (ours >> mine - team * EACH & 1) != 0
                top = gl.where(chose, gl.maximum(peak, gl.max(s, 1) * scale), peak)
                p = gl.exp2(s * scale - gl.where(chose, top, float("inf"))[:, None])
                shrink = gl.where(top == peak, 1.0, gl.exp2(peak - top))
                total = total * shrink + gl.sum(p, 1)
                peak = top
                acc *= gl.convert_layout(shrink, gl.SliceLayout(1, outs))[:, None]
                p = gl.convert_layout(p.to(v_at.dtype), gl.DotOperandLayout(0, outs, 2))
                acc = warpgroup_mma(p, v_at.index(stage), acc, is_async=True)
                acc = warpgroup_mma_wait(0, [acc])
            tell(empty.index(stage))
            turn += 1
        share = gl.where(total > 0, 1.0 / total, 0.0)
        log = peak + gl.log2(total)
        acc *= gl.convert_layout(share, gl.SliceLayout(1, outs))[:, None]
        q_at.index(slot).store(acc.to(q_at.dtype))
        fence_async_shared()
        tell(o_ready.index(done % 2))
        gl.store(lse + visit * C.G + head, log, mask=mine < size)
        done += 1
        mbarrier.wait(q_ready.index(done % 2), done // 2 & 1)
        tile = read(which.index(done % 2))


@gluon.jit(do_not_specialize=["chunk", "spans", "first_visit", "ends"])
def _attend(
    q, q_rest, k, k_rest, v, o, lse, starts, plan, taken, scale, chunk, spans, first_visit, ends, C: gl.constexpr
):  # fmt: skip
    """Of `attend` one program, with q [n * h, dk], k [n, h_kv * dk], v [n, h_kv * dv], o [visits * G, dv] in boxes."""
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
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    o_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    taken_ready = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    taken_empty = gl.allocate_shared_memory(gl.int64, [AHEAD, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(o_ready.index(i), count=TEAMS)
    for i in gl.static_range(AHEAD):
        mbarrier.init(taken_ready.index(i), count=1)
        mbarrier.init(taken_empty.index(i), count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=TEAMS)
    number: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    which = gl.allocate_shared_memory(gl.int32, [2 + AHEAD, 1], number)  # in each place for queries, and those after
    chosen_by = gl.allocate_shared_memory(gl.int32, [STAGES, 1], number)
    memory = (q_at, q2_at, k_at, k2_at, v_at, which, chosen_by)
    bars = (q_ready, o_ready, ready, empty, taken_ready, taken_empty)
    tiles = tiles_of(starts, chunk, spans, C.GROUPS, C.BM)
    gl.warp_specialize(
        [
            (_compute, (0, lse, plan, tiles, first_visit, scale, memory, bars, C)),
            (_compute, (1, lse, plan, tiles, first_visit, scale, memory, bars, C)),
            (_compute, (2, lse, plan, tiles, first_visit, scale, memory, bars, C)),
            (_carry, (q, q_rest, o, plan, tiles, first_visit, ends, memory, bars, C)),
            (_take, (plan, taken, tiles, memory, bars, C)),
            (_load, (k, k_rest, v, plan, tiles, memory, bars, C)),
        ],
        [4, 4, 1, 1, 1],
        [152, 152, 24, 24, 24],
    )


def fits(q: Tensor, v: Tensor, slc: int) -> bool:
    """Whether `attend`, and for its gradients `hopper_picked_backward`, can have q [n, h, dk] and v [n, h_kv, dv] with
    blocks of so many tokens."""
    return takes(q, v) and 16 <= q.shape[1] // v.shape[1] <= 64 and slc == BN.value


def attend(
    q: Tensor, k: Tensor, v: Tensor, found: Visits, documents: Documents, slc: int, o: Tensor, lse: Tensor, chunk: int
) -> None:
    """Attention of the visits of a chunk, each to its blocks: o [chunk, h_kv, most, h / h_kv, dv], lse without dv.

    q [n, h, dk], k [n, h_kv, dk] and v [n, h_kv, dv] are contiguous.
    """
    (n, heads, e), (_, groups, f), (e1, e2) = q.shape, v.shape, halves(q.shape[2])
    g, rows = heads // groups, TEAMS.value * ROWS.value
    size = rows // g
    plan = visits.plan(found, documents, chunk, n, slc, size)
    c = Sizes(
        E=e1, E2=e2, F=f, G=g, GROUPS=groups, MOST=found.most, BM=size, WIDTH=plan.shape[1],
        STAGES=min(8, (SHARED - BARRIERS - 2 * rows * e * 2) // (BN.value * (e + f) * 2)),
    )  # fmt: skip
    _attend[(min(multiprocessors(q.device), len(plan) - 1),)](
        *boxes(q.view(-1, e), g), *columns(k, slc), columns(v, slc)[0], boxes(o.view(-1, f), g)[0], lse,
        found.starts, plan, plan[-1], e**-0.5 * LOG2E, chunk, found.spans, chunk * CHUNK * groups * found.most,
        o.numel() // f, c, num_warps=4, maxnreg=128,
    )  # fmt: skip
