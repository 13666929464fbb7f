"""Held-out loss by how many tokens of its document a token comes after: does a long context help?"""

import torch
from torch import Tensor, nn

from parallel.attention import Documents
from parallel.comm import host_gather
from parallel.loss import IGNORE, CrossEntropy
from parallel.mesh import Mesh
from parallel.transformer import Head

BUCKETS = 6  # [0, s/32), [s/32, s/16), ... [s/2, s) of rows of s tokens


class LossByPosition:
    """Listens to the last layer of `module`, if this rank has it, from now until `read`."""

    def __init__(self, module: nn.Module, loss: CrossEntropy, mesh: Mesh, seq_len: int):
        self.mesh, self.loss = mesh, loss
        self.edges = torch.tensor([0, *(seq_len >> k for k in range(BUCKETS - 1, 0, -1))], device=mesh.device).unique()
        self.sums = torch.zeros(2, len(self.edges), dtype=torch.float64, device=mesh.device)  # losses, labels
        self.labels: list[Tensor] = []
        heads = [m for m in module.modules() if isinstance(m, Head)]
        self.hooks = [head.register_forward_hook(self._count) for head in heads]

    def expect(self, labels: list[Tensor]) -> None:
        """The labels, [rows, seq_len] each, of the passes that come next."""
        self.labels = list(labels)

    @torch.no_grad()
    def _count(self, head: nn.Module, given: tuple[Tensor, Documents], logits: Tensor) -> None:
        labels = self.labels.pop(0).flatten().to(logits.device).long()
        losses = self.loss.tokens(logits, labels)
        bucket = torch.bucketize(given[1].positions, self.edges, right=True) - 1
        self.sums[0].index_add_(0, bucket, losses.double())
        self.sums[1].index_add_(0, bucket, (labels != IGNORE).double())

    def read(self) -> dict[str, float]:
        """val_loss_from/TOKENS: mean loss from that position on to the next one, where there are labels. Collective."""
        for hook in self.hooks:
            hook.remove()
        # Tensor-parallel ranks count the same labels, which their ratio does not see.
        losses, counts = torch.tensor(host_gather(self.sums.tolist(), self.mesh), dtype=torch.float64).sum(0).tolist()
        found = zip(self.edges.tolist(), losses, counts)
        return {f"val_loss_from/{edge:06}": loss / count for edge, loss, count in found if count}
