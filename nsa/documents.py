"""The documents packed in a micro-batch, and where their compression blocks are: made once, used by every layer."""

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nsa import reference


@dataclass(frozen=True)
class Blocks:
    """The m compression blocks of all documents, on the device."""

    first: Tensor  # [m] int32: first token in the pack
    positions: Tensor  # [m]: place of that token in its document
    starts: Tensor  # [2, documents + 1] int32: where documents start, and the end, in tokens and in blocks


@dataclass(frozen=True)
class Documents:
    """The documents packed in a micro-batch of n tokens; attention stays within each."""

    cu_seqlens: Tensor  # [documents + 1] int64, host memory: starts, and n at the end
    positions: Tensor  # [n], on the device: place of a token in its document
    _blocks: dict[tuple[int, int], Blocks] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, cu_seqlens: Tensor, device: torch.device) -> "Documents":
        """From starts on the host. Raises ValueError where they are none."""
        check_documents(cu_seqlens)
        cu_seqlens = cu_seqlens.long()
        positions = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())
        return cls(cu_seqlens, send(positions, device))

    def blocks(self, l: int, d: int) -> Blocks:
        """The blocks of l tokens, one every d, that lie whole in a document; the first layer that asks makes them."""
        if (l, d) not in self._blocks:
            cu_blocks, first, positions = reference.block_starts(self.cu_seqlens, l, d)
            ours = (first.int(), positions, torch.stack((self.cu_seqlens, cu_blocks)).int())
            self._blocks[l, d] = Blocks(*(send(x, self.positions.device) for x in ours))
        return self._blocks[l, d]


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for, which takes pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


def check_documents(cu_seqlens: Tensor, n: int | None = None) -> None:
    """Raises ValueError unless cu_seqlens [documents + 1], int32 or int64, runs from 0 to n tokens and never decreases.

    Without n, to however many.
    """
    whole = cu_seqlens.dim() == 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    ends = cu_seqlens.tolist() if whole else []
    fits = len(ends) > 1 and ends[0] == 0 and n in (None, ends[-1])
    if not fits or any(b < a for a, b in itertools.pairwise(ends)):
        end = "the number of tokens" if n is None else n
        wanted = f"run from 0 to {end} in whole numbers (int32 or int64) and never decrease"
        raise ValueError(f"cu_seqlens is {cu_seqlens}; it must {wanted}")


def check_blocks(k_cmp: Tensor, cu_seqlens: Tensor, l: int, d: int) -> None:
    """Raises ValueError unless k_cmp [m, h_kv, dk] has a row for each compression block."""
    blocks = int(((cu_seqlens.diff() - l).div(d, rounding_mode="floor") + 1).clamp(min=0).sum())
    if len(k_cmp) != blocks:
        shape = tuple(k_cmp.shape)
        raise ValueError(f"k_cmp is {shape}; it must hold the {blocks} compression blocks of these documents")
