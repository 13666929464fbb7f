"""Coordinates and groups of every layout of eight processes."""

import pytest
import torch
import torch.distributed as dist

from parallel import mesh
from tests import ranks


def coordinates(tp: int, pp: int) -> dict:
    place = mesh.build(tp, pp)
    out = {}
    for axis in ("tp", "dp", "pp", "model"):
        group = getattr(place, axis)
        members = torch.zeros(place.world)
        members[place.rank] = 1
        if group.handle is not None:
            dist.all_reduce(members, group=group.handle)
        out[axis] = (group.rank, group.size, members.nonzero().flatten().tolist())
    return out


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_groups_partition_the_ranks(tp, pp):
    world = 4
    found = ranks.run(world, coordinates, tp, pp)
    sizes = {"tp": tp, "pp": pp, "dp": world // (tp * pp), "model": tp * pp}
    for axis, size in sizes.items():
        for rank, place in enumerate(found):
            index, count, members = place[axis]
            assert count == size == len(members)
            assert members[index] == rank
            assert all(found[other][axis][2] == members for other in members)


def test_the_layout_is_deepspeeds():
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=2)
    for rank, place in enumerate(ranks.run(8, coordinates, 2, 2)):
        coordinate = topology.get_coord(rank)
        assert (coordinate.pipe, coordinate.data, coordinate.model) == tuple(place[a][0] for a in ("pp", "dp", "tp"))
