"""Tied embeddings: the head's weight is the embedding's.

In one stage both layers have one parameter. In a pipeline the last stage has a copy of what the first one has, under
the same name, with the same first numbers, and with the sum of both gradients, so that it stays the same.
"""

from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Group

EMBEDDING = "0.tokens.weight"


def tie(embedding: nn.Module, head: nn.Module) -> None:
    """The two layers have one parameter from now on."""
    head.output.weight = embedding.tokens.weight


def copy(head: nn.Module) -> None:
    """The head's weight is a copy of another stage's: DeepSpeed is to leave it out of the gradient norm."""
    head.output.weight.copy_of = EMBEDDING
    head.output.weight.ds_pipe_replicated = True


def is_copy(p: Any) -> bool:
    """Whether another stage has this parameter, and keeps it."""
    return hasattr(p, "copy_of")


def name_of(name: str, p: Any) -> str:
    """Of a parameter in the model, where it is called `name` in a stage."""
    return getattr(p, "copy_of", name)


def at_an_end(module: nn.Module, stages: Group) -> Optional[nn.Parameter]:
    """The first or the last stage's own of a weight that both have; None in the others."""
    if stages.rank == 0:
        return module.get_parameter(EMBEDDING)
    return next((p for p in module.parameters() if is_copy(p)), None)


def add_the_others(x: Tensor, stages: Group) -> None:
    """x of the first stage and x of the last become their sum, on both to the same bit."""
    peer = dist.get_global_rank(stages.handle, stages.size - 1 - stages.rank)
    other = torch.empty_like(x)
    both = [dist.P2POp(dist.isend, x, peer, stages.handle), dist.P2POp(dist.irecv, other, peer, stages.handle)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    x.add_(other)
