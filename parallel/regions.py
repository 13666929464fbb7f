"""Linear layers at the edges of a tensor-parallel region. Their collectives go on while products are computed.

forward                                                      backward
enter: gather | products of the rank's own tokens,           product for dx,
       products of the others                                sum dx | products for the weights' gradients
leave: product of the first tokens,                          gather | product of the rank's own tokens for dx,
       sum them | product of the rest, sum those             products of the others, product for the weight's gradient

`|`: at the same time. Under sequence parallelism a rank has n/tp tokens outside, and a sum is a reduce-scatter; without
it has all n, a sum is an all-reduce, and nothing is gathered.
"""

import torch
from torch import Tensor

from parallel import comm
from parallel.mesh import Group

PIECES = 2  # of the tokens whose sums leave a region: all but the last are sent behind a product


@torch.compiler.disable
def enter(x: Tensor, weights: list[Tensor], group: Group, sequence: bool) -> tuple[Tensor, ...]:
    """x [n or n/tp, k], the same for all weights [m/tp, k] -> [n, m/tp] of each."""
    return _Enter.apply(x, group, sequence, *weights)


@torch.compiler.disable
def leave(x: Tensor, weight: Tensor, group: Group, sequence: bool) -> Tensor:
    """x [n, k/tp], weight [m, k/tp] -> the ranks' sum [n or n/tp, m]. Raises ValueError if n does not divide."""
    if sequence and x.shape[0] % group.size:
        raise ValueError(f"dimension 0 of {tuple(x.shape)} does not divide over {group.size} ranks")
    return _Leave.apply(_Saved.apply(x), weight, group, sequence)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, sequence, *weights):
        x, out = _products(x, [w.t() for w in weights], group, sequence)
        ctx.group, ctx.sequence = group, sequence
        ctx.save_for_backward(x, *weights)
        return tuple(out)

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        partial = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:]):
            partial.addmm_(grad, weight)
        dx = partial.new_empty(len(x) // ctx.group.size, x.shape[1]) if ctx.sequence else partial
        work = comm.reduce_scatter(dx, partial, ctx.group) if ctx.sequence else comm.all_reduce(dx, ctx.group)
        of_weights = [grad.t() @ x for grad in grads]
        work.wait()
        return dx, None, None, *of_weights


class _Saved(torch.autograd.Function):
    """Identity that keeps x for the layer behind it. Recomputation ends with the last tensor that is kept: so it does
    before the layer's product and sum, which nobody needs again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group, sequence):
        ctx.x, ctx.weight, ctx.group, ctx.sequence = x.grad_fn, weight, group, sequence
        ranks = group.size if sequence else 1
        out = x.new_empty(len(x) // ranks, len(weight))
        sums = []
        for piece, tokens in zip(out.chunk(PIECES), x.unflatten(0, (ranks, -1)).chunk(PIECES, dim=1)):
            partial = piece.new_empty(ranks, *piece.shape) if sequence else piece[None]
            for t, p in zip(tokens, partial):
                torch.mm(t, weight.t(), out=p)
            partial = partial.flatten(0, 1)
            sums.append(comm.reduce_scatter(piece, partial, group) if sequence else comm.all_reduce(partial, group))
        for work in sums:
            work.wait()
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.x.saved_tensors
        grad, (dx,) = _products(grad, [ctx.weight], ctx.group, ctx.sequence)
        return dx, grad.t() @ x, None, None


def _products(x: Tensor, factors: list[Tensor], group: Group, sequence: bool) -> tuple[Tensor, list[Tensor]]:
    """x [n, k] of all tokens, gathered from [n/tp, k] under sequence parallelism, and x @ f of each factor f [k, m]."""
    if not sequence:
        return x, [x @ f for f in factors]
    whole, work = comm.all_gather(x, group)
    out = [x.new_empty(len(whole), f.shape[1]) for f in factors]
    first, end = group.rank * len(x), (group.rank + 1) * len(x)
    for f, y in zip(factors, out):
        torch.mm(x, f, out=y[first:end])
    work.wait()
    for others in (slice(0, first), slice(end, None)):
        for f, y in zip(factors, out):
            torch.mm(whole[others], f, out=y[others])
    return whole, out
