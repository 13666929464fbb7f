"""Attention to the chosen blocks for GPUs with a copy engine and warpgroup products (sm_90), in Gluon.

It does what `picked.attend` does, to the bit, for 16-bit heads of whole panels of 64 channels and groups of 16 to 64
heads. Here the copy engine gathers queries and scatters outputs, all heads of a query at once, and not the
threads that compute: the next tile is on its way while this one is multiplied. A tile's outputs take the place of its
queries in shared memory.
"""

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from configs.schema import Attention
from nsa.memory import CHUNK
from nsa.pairs import RUN, Pairs
from nsa.tiles import LOG2E, Documents, locate

ROWS = 64  # (query, head) of a tile
PANEL = 64  # channels side by side in shared memory: 128 bytes


def fits(q: Tensor, v: Tensor, slc: int) -> bool:
    """Whether `attend` can have q [n, h, dk] and v [n, h_kv, dv] with blocks of so many tokens."""
    if not (q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9):
        return False
    (_, heads, e), (_, groups, f) = q.shape, v.shape
    panels = q.element_size() == 2 and e % PANEL == f % PANEL == 0 and f <= e
    return panels and 16 <= heads // groups <= ROWS and slc == ROWS  # of fewer heads at once it is slower


def panels(x: Tensor, rows: int) -> TensorDescriptor:
    """What loads and stores `rows` rows of a panel of x [rows, channels]."""
    layout = gl.NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, PANEL], layout)


@gluon.jit
def _gather(x, to, at, ready, pairs, j, stop, head, heads, GP: gl.constexpr, G: gl.constexpr, PANELS: gl.constexpr):
    """Starts loading the rows of x of the pairs from j on; for those past the end the last one's again."""
    for i in gl.static_range(64 // G):
        row = gl.load(pairs + gl.minimum(j + i, stop - 1)) // GP * heads + head
        for c in gl.static_range(PANELS):
            tma.async_copy_global_to_shared(x, [row, c * 64], ready, to.index(at + c).slice(i * G, G))


@gluon.jit
def _scatter(x, of, at, pairs, j, stop, base, ends, G: gl.constexpr, PANELS: gl.constexpr):
    """Starts storing a tile to the rows of the pairs from j on, counted from pair `base`; nothing past the end."""
    for i in gl.static_range(64 // G):
        row = (gl.load(pairs + gl.minimum(j + i, stop - 1)) - base) * G
        row = gl.where(j + i < stop, row, ends)
        for c in gl.static_range(PANELS):
            tma.async_copy_shared_to_global(x, [row, c * 64], of.index(at + c).slice(i * G, G))


@gluon.jit
def _column(x, to, ready, token, column, PANELS: gl.constexpr):
    """Starts loading a block of one KV head, whose first channel is `column`."""
    for c in gl.static_range(PANELS):
        tma.async_copy_global_to_shared(x, [token, column + c * 64], ready, to.index(c))


@gluon.jit(do_not_specialize=["documents", "chunk", "first"])
def _attend(
    q, k, v, o, lse, keys, order, starts, tokens, documents, scale, chunk, first, blocks, heads, ends,
    G: gl.constexpr, GROUPS: gl.constexpr, E: gl.constexpr, F: gl.constexpr, PICKS: gl.constexpr,
    INITIAL: gl.constexpr, RUN: gl.constexpr,
):  # fmt: skip
    """As `picked._attend`, with q [n * h, dk], k [n, h_kv * dk], v [n, h_kv * dv] and o [pairs * G, dv] in boxes."""
    EP: gl.constexpr = E // 64
    FP: gl.constexpr = F // 64
    GP: gl.constexpr = GROUPS * PICKS
    BM: gl.constexpr = 64 // G
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_at = gl.allocate_shared_memory(q.dtype, [2 * EP, 64, 64], layout)
    k_at = gl.allocate_shared_memory(q.dtype, [EP, 64, 64], layout)
    v_at = gl.allocate_shared_memory(q.dtype, [FP, 64, 64], layout)
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for b in gl.static_range(3):  # two for tiles in turn, one for blocks
        mbarrier.init(ready.index(b), count=1)
    group = gl.program_id(1)
    key0 = (chunk * GROUPS + group) * blocks
    i = gl.load(starts + key0) + gl.program_id(0) * RUN
    end = gl.minimum(i + RUN, gl.load(starts + key0 + blocks))
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, sums))
    tile, stretch = 0, 0
    while i < end:
        key = gl.load(keys + i)
        stop = gl.minimum(end, gl.load(starts + key + 1))
        _, start, _, place = locate(key - key0, tokens, documents, 64)
        i = gl.where(place < INITIAL * 64, stop, i)  # those were attended to with the local blocks
        if i < stop:
            tma.store_wait(0)
            mbarrier.expect(ready.index(tile % 2), EP * 64 * 128)
            _gather(q, q_at, tile % 2 * EP, ready.index(tile % 2), order, i, stop, group * G, heads, GP, G, EP)
            mbarrier.expect(ready.index(2), (EP + FP) * 64 * 128)
            _column(k, k_at, ready.index(2), start + place, group * E, EP)
            _column(v, v_at, ready.index(2), start + place, group * F, FP)
            mbarrier.wait(ready.index(2), stretch & 1)
            stretch += 1
            while i < stop:
                here, other = tile % 2, (tile + 1) % 2
                mbarrier.wait(ready.index(here), (tile // 2) & 1)
                s = gl.zeros([64, 64], gl.float32, sums)
                for c in gl.static_range(EP):
                    q1, k1 = q_at.index(here * EP + c), k_at.index(c).permute((1, 0))
                    s = warpgroup_mma(q1, k1, s, use_acc=c > 0, is_async=True)
                if i + BM < stop:
                    tma.store_wait(0)
                    mbarrier.expect(ready.index(other), EP * 64 * 128)
                    _gather(q, q_at, other * EP, ready.index(other), order, i + BM, stop, group * G, heads, GP, G, EP)
                s = warpgroup_mma_wait(0, [s])
                peak = gl.max(s, 1) * scale
                p = gl.exp2(s * scale - gl.expand_dims(peak, 1))
                total = gl.sum(p, 1)
                there = i + row // G < stop
                pair = gl.load(order + i + row // G, mask=there, other=0)
                gl.store(lse + (pair - first * GP) * G + row % G, peak + gl.log2(total), mask=there)
                p = gl.convert_layout(p.to(q.dtype), weights)
                share = gl.expand_dims(1.0 / total, 1)
                for c in gl.static_range(FP):
                    out = warpgroup_mma(p, v_at.index(c), gl.zeros([64, 64], gl.float32, sums), use_acc=False)
                    q_at.index(here * EP + c).store((out * share).to(q.dtype))
                fence_async_shared()
                _scatter(o, q_at, here * EP, order, i, stop, first * GP, ends, G, FP)
                tile += 1
                i += BM
        i = stop
    tma.store_wait(0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    pairs: Pairs, documents: Documents, sizes: Attention, c: int,
) -> None:  # fmt: skip
    """As `picked.attend`."""
    (n, heads, e), (_, groups, f), blocks = q.shape, v.shape, documents.tiles(sizes.l_slc)
    g, picks, count = heads // groups, o.shape[2], min(CHUNK, n - c * CHUNK)
    out = o.view(-1, f)
    _attend[triton.cdiv(count * picks, RUN), groups](
        panels(q.reshape(-1, e), g), panels(k.reshape(n, -1), ROWS), panels(v.reshape(n, -1), ROWS), panels(out, g),
        lse, pairs.keys, pairs.order, pairs.starts, documents.tokens, documents.count, e**-0.5 * LOG2E, c, c * CHUNK,
        blocks, heads, len(out), G=g, GROUPS=groups, E=e, F=f, PICKS=picks, INITIAL=sizes.initial, RUN=RUN, num_warps=4,
    )  # fmt: skip
