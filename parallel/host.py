"""Room in host memory for what an engine holds, locked for a GPU, so that a copy takes the time of the bus alone."""

import sys

import torch
from torch import Tensor

from parallel.pieces import KINDS


class HostMemory:
    """Copies of the optimizer's flat fp32 tensors, by group and kind; every `copy` uses the same memory.

    To lock it takes longer than a copy does: worth it for memory that is used again.
    """

    def __init__(self, masters: list[Tensor], lock: bool):
        self.flat = [{kind: torch.empty(m.shape, dtype=m.dtype) for kind in KINDS} for m in masters]
        # Not by pin_memory=True, which rounds each tensor up to a power of two.
        self.locked = [x for group in self.flat for x in group.values() if lock and masters[0].is_cuda and _lock(x)]

    def __del__(self):
        for x in self.locked:
            torch.cuda.cudart().cudaHostUnregister(x.data_ptr())

    def copy(self, flat: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The tensors as they are now, until the next copy."""
        for mine, theirs in zip(self.flat, flat):
            for kind, x in mine.items():
                x.copy_(theirs[kind].detach(), non_blocking=True)
        if any(x.is_cuda for group in flat for x in group.values()):
            torch.cuda.current_stream().synchronize()
        return self.flat


def _lock(x: Tensor) -> bool:
    """Lock the pages of a host tensor; where the system does not let us, copies are only slower."""
    error = torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.nbytes, 0) if x.nbytes else None
    if error is not None and int(error):
        print(f"warning: {x.nbytes:,} bytes of host memory cannot be locked ({error}): saves stall", file=sys.stderr)
    return error is not None and not int(error)
