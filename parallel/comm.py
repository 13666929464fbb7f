"""Collectives of tensor parallelism, and agreement between hosts.

Three that act on dimension 0 start, and give a `Work` to wait for: all_reduce, all_gather, reduce_scatter. Three have a
gradient and wait; those of the linear layers do not, and are in parallel/regions.py:

forward          backward         where
copy: identity   all-reduce       a replicated tensor enters sharded work
reduce: all-reduce  identity      partial sums leave it
scatter: reduce-scatter  all-gather  partial sums leave it as token shards (sequence parallelism)
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


def all_reduce(x: Tensor, group: Group) -> dist.Work:
    """Starts the sum over the group, in place."""
    return dist.all_reduce(x, group=group.handle, async_op=True)


def all_gather(x: Tensor, group: Group) -> tuple[Tensor, dist.Work]:
    """Starts [n, ...] on each rank -> [size * n, ...], in rank order."""
    out = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    return out, _gather(out, x.contiguous(), group=group.handle, async_op=True)


def reduce_scatter(out: Tensor, x: Tensor, group: Group) -> dist.Work:
    """Starts [size * n, ...] on each rank -> this rank's `out` [n, ...] of the sum."""
    return _scatter(out, x.contiguous(), group=group.handle, async_op=True)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        all_reduce(grad, ctx.group).wait()
        return grad, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        x = x.clone(memory_format=torch.contiguous_format)
        all_reduce(x, group).wait()
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
        reduce_scatter(out, x, group).wait()
        return out

    @staticmethod
    def backward(ctx, grad):
        out, work = all_gather(grad, ctx.group)
        work.wait()
        return out, None


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


def scatter(x: Tensor, group: Group) -> Tensor:
    """Sum over the group, this rank's part of dimension 0; the gradient is gathered."""
    if x.shape[0] % group.size:
        raise ValueError(f"dimension 0 of {tuple(x.shape)} does not divide over {group.size} ranks")
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
