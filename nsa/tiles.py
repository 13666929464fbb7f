"""How kernels cut packed documents into tiles, and the few things all of them do.

A tile of `SIZE` tokens never crosses a document. Document i owns the tiles from `starts[i] // SIZE + i` on: enough for
any lengths, a few of them empty, and found without a table.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Documents:
    """Packed documents on the device, and the sizes that grids need, known on the host."""

    tokens: Tensor  # [documents + 1] int32: starts, and the end
    blocks: Tensor  # [documents + 1] int32: the same for compression blocks
    count: int
    length: int  # of all tokens
    longest: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, starts: Tensor) -> "Documents":
        """From cu_seqlens [documents + 1] in host memory and the starts of `documents.Blocks`."""
        longest = int(cu_seqlens.diff().max())
        return cls(starts[0], starts[1], len(cu_seqlens) - 1, int(cu_seqlens[-1]), longest)

    def tiles(self, size: int) -> int:
        """Tiles of `size` tokens, the empty ones included."""
        return self.length // size + self.count


@dataclass(frozen=True)
class Launch:
    """How a kernel is cut: rows (query, head) and keys of a tile, warps, and loads in flight."""

    rows: int
    columns: int
    warps: int
    stages: int

    def queries(self, group: int) -> int:
        """Queries of a tile."""
        return max(1, self.rows // group)

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def halves(width: int) -> tuple[int, int]:
    """A head's width as two powers of two, the second perhaps 0: 192 is 128 and 64."""
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def kind(q: Tensor, v: Tensor) -> str:
    """Which tiles suit: "fp32", or for 16-bit elements "narrow" heads of 64 and less, "middle", "wide" above 128."""
    if q.element_size() == 4:
        return "fp32"
    width = max(q.shape[2], v.shape[2])
    return "narrow" if width <= 64 else "middle" if width <= 128 else "wide"


def rows(x: Tensor) -> Tensor:
    """x [n, h, e] as every kernel reads it: channels side by side, and heads where the copy engine can fetch them.

    That one takes no expanded tensors, whose stride is 0.
    """
    step, (token, head, channel) = 16 // x.element_size(), x.stride()
    ready = channel == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % step == 0 for s in (token, head))
    return x if ready else x.clone(memory_format=torch.contiguous_format)


def boxes(x: Tensor, tokens: int, heads: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """What loads tiles of x [n, h, e], one descriptor for each of the `halves` of e."""
    e, e2 = halves(x.shape[2])
    cut = [TensorDescriptor(x, x.shape, x.stride(), [tokens, heads, width]) for width in (e, e2 or e)]
    return cut[0], cut[1]


def columns(x: Tensor, tokens: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """What loads tiles of one head of x [n, h, e], which starts at column head * x.stride(1); as `boxes` otherwise."""
    n, heads, e = x.shape
    width = (heads - 1) * x.stride(1) + e
    cut = [TensorDescriptor(x, [n, width], [x.stride(0), 1], [tokens, half]) for half in halves(e) if half]
    return cut[0], cut[-1]


def stretches(x: Tensor, size: int) -> TensorDescriptor:
    """What loads `size` numbers of contiguous x, as if it were flat: what belongs to the rows of a tile."""
    return TensorDescriptor(x, [x.numel()], [1], [size])


def precision(x: Tensor) -> str:
    """What products of fp32 operands are computed in; 16-bit operands have one way only."""
    return "tf32x3" if x.is_cuda else "ieee"


@triton.jit
def locate(tile, starts, documents, SIZE: tl.constexpr):
    """(document, its first token in the pack, its length, the tile's place in it) of a tile."""
    low, step = tile * 0, 1
    while step < documents:
        step *= 2
    while step > 1:
        step //= 2
        middle = tl.minimum(low + step, documents)
        inside = (middle < documents) & (tl.load(starts + middle) // SIZE + middle <= tile)
        low = tl.where(inside, middle, low)
    start = tl.load(starts + low)
    return low, start, tl.load(starts + low + 1) - start, (tile - start // SIZE - low) * SIZE
