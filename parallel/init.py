"""First weights as a function of (seed, parameter name), so that every layout starts from the same numbers."""

import hashlib
import math

import torch
from torch import Tensor, nn

from configs.schema import Model
from parallel.mesh import Group
from parallel.tied import name_of


@torch.no_grad()
def initialize(module: nn.Module, model: Model, seed: int, tp: Group) -> None:
    """Fill every parameter of `module`; a cut one gets its part of the whole. Names start with the layer's index."""
    for own, p in module.named_parameters():
        name = name_of(own, p)
        shape = list(p.shape)
        dim = getattr(p, "shard_dim", None)
        if dim is not None:
            shape[dim] *= tp.size
        whole = initial(name, tuple(shape), model, seed)
        p.copy_(whole if dim is None else whole.chunk(tp.size, dim)[tp.rank])


def initial(name: str, shape: tuple[int, ...], model: Model, seed: int) -> Tensor:
    """The first value of a whole parameter, fp32 on the host: ones for norms, zeros for biases, else normal."""
    leaf = name.rsplit(".", 1)[-1]
    if "norm." in name:
        return torch.ones(shape)
    if leaf in ("b1", "b2"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator) * _std(name, leaf, shape, model)


def _std(name: str, leaf: str, shape: tuple[int, ...], model: Model) -> float:
    if leaf in ("w1", "w2"):  # the compression MLP keeps the scale of the keys it compresses
        return 1 / math.sqrt(shape[1])
    if ".wo." in name or ".down." in name:  # each block adds two of these to the residual
        return model.init_std / math.sqrt(2 * model.layers)
    return model.init_std
