"""SwiGLU (arXiv 2002.05202): column-parallel in, row-parallel out."""

import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Model
from parallel.tensor import ColumnLinear, RowLinear, TensorParallel, columns


class MLP(nn.Module):
    """x [n or n/tp, dim] -> the same shape."""

    def __init__(self, model: Model, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.gate = ColumnLinear(model.dim, model.mlp_dim, tp)
        self.up = ColumnLinear(model.dim, model.mlp_dim, tp)
        self.down = RowLinear(model.mlp_dim, model.dim, tp)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = columns(self.tp, x, self.gate, self.up)
        return self.down(F.silu(gate) * up)
