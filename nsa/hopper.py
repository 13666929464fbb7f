"""What kernels for GPUs with a copy engine and warpgroup products (sm_90) share, in Gluon."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.tiles import halves

SHARED = 232_448  # bytes of shared memory that a program may have
BARRIERS = 1_024  # of them kept for barriers, and for the start of a panel
BN = gl.constexpr(64)  # keys of a tile
ROWS = gl.constexpr(64)  # (query, head) of a warpgroup
TEAMS = gl.constexpr(3)  # warpgroups that compute


@dataclass(frozen=True)
class Widths:
    """Of heads, that a kernel is compiled for."""

    E: int  # channels of a key: the first
    E2: int  # and the others
    F: int  # channels of a value
    G: int  # heads of a group


@gluon.jit
def tell(bar):
    """Arrives at a barrier once all warps of this partition have come here."""
    tl.debug_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def write(at, value):
    """Leaves a number in shared memory."""
    at.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))


@gluon.jit
def read(at):
    """A number in shared memory."""
    return gl.max(at.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether q [n, h, dk] is on such a GPU, in 16 bit, and heads have 64, 128, or 192 and 128 channels."""
    there = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and q.element_size() == 2
    return there and q.shape[2] in (64, 128, 192) and v.shape[2] == halves(q.shape[2])[0]


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere, where kernels are only compiled, 1."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def boxes(x: Tensor, rows: int) -> list[TensorDescriptor]:
    """What loads `rows` rows of x [rows, channels], for the `halves` of a head's channels."""
    layout = gl.NVMMASharedLayout(128, 16, 2)
    e, e2 = halves(x.shape[1])
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, width], layout) for width in (e, e2 or e)]


def columns(x: Tensor, rows: int) -> list[TensorDescriptor]:
    """As `tiles.columns`."""
    n, heads, e = x.shape
    layout, shape = gl.NVMMASharedLayout(128, 16, 2), [n, (heads - 1) * x.stride(1) + e]
    e, e2 = halves(e)
    return [TensorDescriptor(x, shape, [x.stride(0), 1], [rows, width], layout) for width in (e, e2 or e)]
