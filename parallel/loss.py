"""Cross entropy over a vocabulary that is cut over the tensor-parallel ranks; whole logits are never gathered."""

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Group

IGNORE = -100  # label of a position that predicts nothing: the end of a document, padding


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group):
        x, sums, index, mine = _parts(logits, labels, group)
        counted = labels != IGNORE
        ctx.save_for_backward(x.div_(sums[0][:, None]).to(logits.dtype), index, mine, counted)
        return ((sums[0].log() - sums[1]) * counted).sum()

    @staticmethod
    def backward(ctx, grad):
        probabilities, index, mine, counted = ctx.saved_tensors
        out = probabilities.scatter_add(1, index, -mine[:, None].to(probabilities.dtype))
        return out.mul_((counted * grad)[:, None].to(out.dtype)), None, None


def _parts(logits: Tensor, labels: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """exp(logit - peak) [n, vocab/tp]; its sum and the label's logit - peak, [2, n]; the label's index [n, 1]; whether
    it lies on this rank [n]."""
    x = logits.float()
    peak = x.amax(dim=1)  # [n]
    if group.size > 1:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group.handle)
    x = x - peak[:, None]
    local = labels - group.rank * logits.shape[1]
    mine = (local >= 0) & (local < logits.shape[1])
    index = local.where(mine, 0)[:, None]
    target = x.gather(1, index).squeeze(1) * mine  # [n], zero where another rank has it
    x = x.exp_()
    sums = torch.stack((x.sum(dim=1), target))
    if group.size > 1:
        dist.all_reduce(sums, group=group.handle)
    return x, sums, index, mine


def token_losses(logits: Tensor, labels: Tensor, group: Group) -> Tensor:
    """-log p of each of `labels`, fp32 [n], zero where it is IGNORE; no gradient. Arguments as below."""
    with torch.no_grad():
        _, sums, _, _ = _parts(logits, labels, group)
        return (sums[0].log() - sums[1]) * (labels != IGNORE)


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Group) -> Tensor:
    """Sum of -log p of `labels` [n] (IGNORE counts nothing) under `logits` [n, vocab/tp]: an fp32 scalar."""
    return _VocabParallelCrossEntropy.apply(logits, labels, group)
