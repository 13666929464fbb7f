"""The four conjugate collectives of tensor parallelism, each with its gradient, and agreement between hosts.

The four act on dimension 0:

forward          backward         where
copy: identity   all-reduce       a replicated tensor enters sharded work
reduce: all-reduce  identity      partial sums leave it
gather: all-gather  reduce-scatter   token shards enter it (sequence parallelism)
scatter: reduce-scatter  all-gather  partial sums leave it as token shards
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import RunError
from parallel.mesh import Group, Mesh

T = TypeVar("T")
# Of one tensor: lists of tensors would be copied. torch 2.13 gave them these names, and warns of the old ones.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, in a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group.handle)
    return x


def all_gather(x: Tensor, group: Group) -> Tensor:
    """[n, ...] on each rank -> [size * n, ...], in rank order."""
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    _gather(out, x.contiguous(), group=group.handle)
    return out


def reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """[size * n, ...] on each rank -> this rank's [n, ...] of the sum. Raises ValueError if that does not divide."""
    if x.shape[0] % group.size:
        raise ValueError(f"dimension 0 of {tuple(x.shape)} does not divide over {group.size} ranks")
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    _scatter(out, x.contiguous(), group=group.handle)
    return out


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.group), None


@torch.compiler.disable
def _apply(collective: type[torch.autograd.Function], x: Tensor, group: Group) -> Tensor:
    """What is compiled ends before a collective and begins anew behind it."""
    return collective.apply(x, group)


def copy(x: Tensor, group: Group) -> Tensor:
    """Identity; the gradient is summed over the group."""
    return x if group.size == 1 else _apply(_Copy, x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """Sum over the group; the gradient passes as it is."""
    return x if group.size == 1 else _apply(_Reduce, x, group)


def gather(x: Tensor, group: Group) -> Tensor:
    """All-gather over dimension 0; the gradient is summed and scattered."""
    return x if group.size == 1 else _apply(_Gather, x, group)


def scatter(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, this rank's part of dimension 0; the gradient is gathered."""
    return x if group.size == 1 else _apply(_Scatter, x, group)


def host_sum(values: list[int], mesh: Mesh) -> list[int]:
    """Sums of host integers over all ranks; the device is not waited for. Collective."""
    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total, group=mesh.control)
    return total.tolist()


def host_gather(value: T, mesh: Mesh) -> list[T]:
    """The value of every rank, in rank order, through pickle. Collective."""
    out: list[Any] = [None] * mesh.world
    dist.all_gather_object(out, value, group=mesh.control)
    return out


def agree(mesh: Mesh, ask: Callable[[], T]) -> T:
    """What rank 0 sees, on every rank: folders of a network file system may look different for a moment. Collective."""
    return host_gather(ask() if mesh.rank == 0 else None, mesh)[0]


def together(work: Callable[[], T], mesh: Mesh) -> T:
    """Do the work on every rank and wait for all; the first RunError of a rank is raised on all. Collective."""
    result, error = None, None
    try:
        result = work()
    except RunError as e:
        error = e
    failed = [e for e in host_gather(error, mesh) if e is not None]
    if failed:
        raise failed[0]
    return result
