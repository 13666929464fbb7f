"""Cross entropy over a vocabulary that is cut over the tensor-parallel ranks; whole logits are never gathered, and,
where it is compiled, never held in fp32."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group

IGNORE = -100  # label of a position that predicts nothing: the end of a document, padding


class CrossEntropy:
    """Sum of -log p of labels [n] (IGNORE counts nothing) under logits [n, vocab/tp]: an fp32 scalar.

    Backward writes the gradient over the logits, which are the largest tensor of a model: they serve once.
    """

    def __init__(self, group: Group, compiled: Callable = lambda f: f):
        self.group = group
        self.statistics, self.gradient = compiled(_statistics), compiled(_gradient)

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return _CrossEntropy.apply(logits, labels, self)

    @torch.no_grad()
    def tokens(self, logits: Tensor, labels: Tensor) -> Tensor:
        """-log p of each label, fp32 [n], zero where it is IGNORE; no gradient."""
        _, log_sum, target = self.parts(logits, labels)
        return (log_sum - target) * (labels != IGNORE)

    def parts(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the whole vocabulary: peak of the logits, log of the sum of exp(logit - peak), label's logit - peak."""
        peak, total, target = self.statistics(logits, labels, self.group.rank * logits.shape[1])
        if self.group.size == 1:
            return peak, total.log(), target
        own = peak.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group.handle)
        mine = _column(labels, self.group.rank * logits.shape[1], logits.shape[1])[1]
        sums = torch.stack((total * (own - peak).exp(), (target + own - peak) * mine))
        dist.all_reduce(sums, group=self.group.handle)
        return peak, sums[0].log(), sums[1]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, loss):
        peak, log_sum, target = loss.parts(logits, labels)
        ctx.loss = loss
        ctx.save_for_backward(logits, labels, peak, log_sum)
        return ((log_sum - target) * (labels != IGNORE)).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, labels, peak, log_sum = ctx.saved_tensors
        ctx.loss.gradient(logits, labels, peak, log_sum, grad, ctx.loss.group.rank * logits.shape[1])
        return logits, None, None


def _column(labels: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Place of each label among `count` columns that begin at `first`, and whether it is one of them."""
    local = labels - first
    return local, (local >= 0) & (local < count)


def _statistics(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the columns of this rank: peak, sum of exp(logit - peak), label's logit - peak (0 if it is elsewhere)."""
    peak = logits.amax(dim=1).float()
    local, mine = _column(labels, first, logits.shape[1])
    target = logits.gather(1, local.where(mine, 0)[:, None]).squeeze(1).float()
    return peak, (logits.float() - peak[:, None]).exp().sum(dim=1), (target - peak) * mine


def _gradient(logits: Tensor, labels: Tensor, peak: Tensor, log_sum: Tensor, grad: Tensor, first: int) -> None:
    """Replace the logits by the gradient with respect to them, `grad` being that of the sum."""
    probabilities = (logits.float() - peak[:, None] - log_sum[:, None]).exp()
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    scale = grad * (labels != IGNORE)
    logits.copy_((probabilities - (columns == labels[:, None]).float()) * scale[:, None])
