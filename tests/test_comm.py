"""Each collective against its definition in plain torch: forward, and the gradient of a sum over ranks."""

import pytest
import torch

from parallel import comm, mesh
from tests import ranks

N = 6


def whole(rank: int) -> torch.Tensor:
    return torch.arange(N * 2, dtype=torch.float64).view(N, 2).sin() * (rank + 1)


def forward_and_gradient(name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    group = mesh.build(tp=torch.distributed.get_world_size(), pp=1).tp
    x = whole(group.rank)[:rows].requires_grad_()
    y = getattr(comm, name)(x, group)
    (y * (torch.arange(y.numel()).view_as(y) + group.rank)).sum().backward()  # a gradient that differs by rank
    return y.detach(), x.grad


def weights(shape: tuple[int, ...], rank: int) -> torch.Tensor:
    return (torch.arange(shape[0] * shape[1]).view(shape) + rank).double()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_copy(world):
    for rank, (y, grad) in enumerate(ranks.run(world, forward_and_gradient, "copy", N)):
        assert torch.equal(y, whole(rank))
        assert torch.equal(grad, sum(weights((N, 2), r) for r in range(world)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_reduce(world):
    for rank, (y, grad) in enumerate(ranks.run(world, forward_and_gradient, "reduce", N)):
        torch.testing.assert_close(y, sum(whole(r) for r in range(world)))
        assert torch.equal(grad, weights((N, 2), rank))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_scatter(world):
    rows = N // world
    for rank, (y, grad) in enumerate(ranks.run(world, forward_and_gradient, "scatter", N)):
        total = sum(whole(r) for r in range(world))
        torch.testing.assert_close(y, total[rank * rows : (rank + 1) * rows])
        assert torch.equal(grad, torch.cat([weights((rows, 2), r) for r in range(world)]))


def test_scatter_refuses_a_length_that_does_not_divide():
    with pytest.raises(AssertionError, match="does not divide over 2 ranks"):
        ranks.run(2, forward_and_gradient, "scatter", 5)


def sums() -> list[int]:
    place = mesh.build(tp=1, pp=1)
    return comm.host_sum([place.rank, 2**40], place)


def test_host_sum_is_exact_beyond_float():
    assert ranks.run(3, sums) == [[3, 3 * 2**40]] * 3
