"""Gradients are summed over the data-parallel ranks while backward still goes on.

DeepSpeed's BF16_Optimizer sums micro-batches in one flat fp32 tensor a group, and begins to reduce it when the last
backward has ended, by way of copies. Here pieces of that tensor are reduced where they are, each as soon as its
gradients are whole. They start in one order on every rank, whatever is ready first: collectives have to.
"""

import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group

PIECE = 50_000_000  # elements at least: 200 MB take half a millisecond over NVLink


class Reducer:
    """Means over `group` of the flat gradients, which hold parameters of these `sizes` one behind the other.

    Each parameter is `added` to once a micro-batch. One that gets no gradient only delays: `finish` starts the rest.
    """

    def __init__(self, flat: list[Tensor], sizes: list[list[int]], group: Group, micro_batches: int):
        self.group = group
        self.pieces: list[Tensor] = []  # as they start: backward comes from the end of the model
        self.piece_of: dict[tuple[int, int], int] = {}
        self.whole: list[int] = []  # additions after which a piece is whole
        self.waiting_for: list[int] = []
        self.started: list[dist.Work] = []
        if group.size == 1:
            return
        for g, numbers in enumerate(sizes):
            end = sum(numbers)
            begin, count = end, 0
            for i in reversed(range(len(numbers))):
                begin, count = begin - numbers[i], count + 1
                self.piece_of[g, i] = len(self.pieces)
                if end - begin >= PIECE or i == 0:
                    self.pieces.append(flat[g].narrow(0, begin, end - begin))
                    self.whole.append(count * micro_batches)
                    end, count = begin, 0
        self.waiting_for = list(self.whole)

    def added(self, group: int, index: int) -> None:
        """A micro-batch's gradient of this parameter is in its sum."""
        if self.group.size == 1:
            return
        self.waiting_for[self.piece_of[group, index]] -= 1
        while len(self.started) < len(self.pieces) and self.waiting_for[len(self.started)] == 0:
            self._start()

    def finish(self) -> None:
        """All gradients are added: whatever follows on the device sees the means. Collective."""
        while len(self.started) < len(self.pieces):
            self._start()
        for work, piece in zip(self.started, self.pieces):
            work.wait()
            piece.mul_(1 / self.group.size)
        self.started, self.waiting_for = [], list(self.whole)

    def _start(self) -> None:
        piece = self.pieces[len(self.started)]
        self.started.append(dist.all_reduce(piece, group=self.group.handle, async_op=True))
