"""The processes of a run and how they share the model: sizes, coordinates and groups, built once, passed as arguments.

Ranks are laid out as DeepSpeed's grid has them: pipeline stage outermost, then data, tensor innermost, so that the
ranks of a tensor-parallel group sit on one machine.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """One process group as seen by this rank. `handle` is None where the group has one member."""

    handle: Optional[dist.ProcessGroup]
    rank: int
    size: int


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `model` joins the tensor and pipeline ranks of one replica; `control` is for host tensors."""

    rank: int
    world: int
    device: torch.device
    tp: Group
    dp: Group
    pp: Group
    model: Group
    control: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1


def rendezvous() -> tuple[dist.Store, int, int]:
    """The store that all processes share, this one's rank, and their number: torchrun's, or alone without it."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        return dist.HashStore(), 0, 1
    return next(dist.rendezvous("env://"))


def start_processes(store: dist.Store, rank: int, world: int, timeout: int) -> None:
    """Join the other processes. `timeout` in seconds holds for every group made later, DeepSpeed's too."""
    wait = timedelta(seconds=timeout)
    dist.distributed_c10d.default_pg_timeout = wait
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed picks the device
    own = device if backend() == "nccl" else None
    dist.init_process_group(backend(), store=store, rank=rank, world_size=world, timeout=wait, device_id=own)


def local_device() -> torch.device:
    """The device of this process; processes beyond the number of GPUs share them."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def backend() -> str:
    """NCCL where each process of the machine has a GPU of its own (it needs that), gloo elsewhere."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    return "nccl" if torch.cuda.is_available() and local <= torch.cuda.device_count() else "gloo"


def build(tp: int, pp: int) -> Mesh:
    """Build the groups of a tp x pp layout over all processes; dp takes the rest. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = torch.arange(world).view(pp, world // (tp * pp), tp)  # [pp, dp, tp]
    return Mesh(
        rank=rank,
        world=world,
        device=local_device(),
        tp=_join(ranks.reshape(-1, tp), rank),
        dp=_join(ranks.transpose(1, 2).reshape(-1, ranks.shape[1]), rank),
        pp=_join(ranks.permute(1, 2, 0).reshape(-1, pp), rank),
        model=_join(ranks.transpose(0, 1).reshape(ranks.shape[1], -1), rank),
        control=dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo"),
    )


def _join(lines: torch.Tensor, rank: int) -> Group:
    """Make the groups that `lines` lists, one a row, on all ranks; return the one that holds `rank`."""
    mine = None
    for line in lines.tolist():
        handle = dist.new_group(line) if len(line) > 1 else None
        if rank in line:
            mine = Group(handle, line.index(rank), len(line))
    assert mine is not None
    return mine
