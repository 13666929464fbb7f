"""Tensor-parallel layers: weights cut by column, row or vocabulary. Activations are flat over tokens: [n, dim].

Every cut parameter carries `tensor_model_parallel` (DeepSpeed counts it on all ranks in the gradient norm) and
`shard_dim`, the dimension that is cut. Weights are created empty; parallel/init.py fills them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel import comm, regions
from parallel.mesh import Group


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share a layer's work.

    Without sequence parallelism activations outside are whole on each rank [n, dim]; with it each rank holds its
    n/tp consecutive tokens there, and norms and residuals work on those.
    """

    group: Group
    sequence: bool

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums [n, dim] -> [n or n/tp, dim]."""
        return comm.scatter(x, self.group) if self.sequence else comm.reduce(x, self.group)

    def share(self, weight: Tensor) -> Tensor:
        """A replicated weight used between the regions: sequence parallel ranks each see a part of its gradient."""
        return comm.copy(weight, self.group) if self.sequence else weight

    def share_inside(self, weight: Tensor) -> Tensor:
        """A replicated weight used inside sharded work (on this rank's heads): its gradient is summed."""
        return comm.copy(weight, self.group)


def sharded(shape: tuple[int, ...], dim: int) -> nn.Parameter:
    """An empty parameter of local shape `shape` whose whole is cut along `dim`."""
    weight = nn.Parameter(torch.empty(shape))
    weight.tensor_model_parallel = True
    weight.shard_dim = dim
    return weight


class ColumnLinear(nn.Module):
    """dim_in -> dim_out/tp: each rank has its rows of the weight. Layers of one input enter `columns` together."""

    def __init__(self, dim_in: int, dim_out: int, tp: TensorParallel):
        super().__init__()
        self.weight = sharded((dim_out // tp.group.size, dim_in), dim=0)


def columns(tp: TensorParallel, x: Tensor, *layers: ColumnLinear) -> tuple[Tensor, ...]:
    """Into a region: x [n or n/tp, dim_in] -> [n, dim_out/tp] of each layer."""
    weights = [layer.weight for layer in layers]
    if tp.group.size == 1:
        return tuple(F.linear(x, w) for w in weights)
    return regions.enter(x, weights, tp.group, tp.sequence)


class RowLinear(nn.Module):
    """Out of a region: x [n, dim_in/tp] -> [n or n/tp, dim_out], the sum over the ranks."""

    def __init__(self, dim_in: int, dim_out: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = sharded((dim_out, dim_in // tp.group.size), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.tp.group.size == 1:
            return F.linear(x, self.weight)
        return regions.leave(x, self.weight, self.tp.group, self.tp.sequence)


class VocabEmbedding(nn.Module):
    """tokens [n] -> [n or n/tp, dim]: each rank looks up its part of the vocabulary, the sum leaves the region."""

    def __init__(self, vocab: int, dim: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = sharded((vocab // tp.group.size, dim), dim=0)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.tp.group.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.tp.group.rank * self.weight.shape[0]
        mine = (local >= 0) & (local < self.weight.shape[0])
        x = F.embedding(local.where(mine, 0), self.weight)
        return self.tp.leave(x * mine[:, None])


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32, with a replicated scale."""

    def __init__(self, dim: int, eps: float, tp: TensorParallel):
        super().__init__()
        self.eps = eps
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.tp.share(self.weight)
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.eps).to(x.dtype)
