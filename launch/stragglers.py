"""Finds the rank that holds the others up though nothing fails: a hot device, a slow disk, another program on its node.

All take equally long over a step, as they wait for one another. So each counts what it does before it waits: until it
arrives at the sum with which a step begins (data, and whatever else its host does), then forward, and backward where
gradients are summed apart from it. Ranks of a tensor-parallel group wait inside forward: a slow device slows its group.
"""

import socket
from collections import deque
from statistics import median, median_low
from typing import Any

from parallel.comm import host_gather, host_sum
from parallel.mesh import Mesh

LOOKS = 5  # logged steps by whose median ranks are judged
SHARE = 0.1  # of a step: a rank that is so much later than its like is slow,
LEAST = 0.1  # if these are as many seconds: in short steps chance decides who is last


class Stragglers:
    """Compares the ranks that do the same work, those of one pipeline stage. Collective, all of it."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.ranks = host_gather((socket.gethostname(), mesh.pp.rank), mesh)
        self.seen: deque[list[float]] = deque(maxlen=LOOKS)  # seconds of own work, by rank
        self.named, self.news = -1, ""

    def look(self, before: float, parts: dict[str, float], step_s: float) -> dict[str, Any]:
        """Tell this rank's seconds before it waited in a step, and the step's parts. Returns what to log: who is
        slowest, and by how much. `news` is a sentence where another rank than before is slow, or no longer one.
        """
        if not parts or self.mesh.world == 1:
            return {}
        mine = [0] * self.mesh.world
        mine[self.mesh.rank] = int(1e6 * (before + own(parts)))
        self.seen.append([us / 1e6 for us in host_sum(mine, self.mesh)])
        rank, late = slowest([median(times) for times in zip(*self.seen)], [stage for _, stage in self.ranks])
        slow = rank if late > max(SHARE * step_s, LEAST) and len(self.seen) == LOOKS else -1
        self.news = "" if slow == self.named else self._say(slow, late)
        self.named = slow
        return {"slowest_rank": rank, "slowest_by_s": late}

    def _say(self, rank: int, late: float) -> str:
        if rank < 0:
            return f"rank {self.named} is as fast as the others again"
        host, _ = self.ranks[rank]
        return f"warning: rank {rank} (host {host}) holds the others up: {late:.3f} s a step more than its like"


def own(parts: dict[str, float]) -> float:
    """Of a step's parts, the seconds in which a rank does not wait for those of other rows."""
    apart = parts.keys() & {"time/reduce_gradients_s", "time/stages_s"}
    return parts.get("time/forward_s", 0.0) + (parts.get("time/backward_s", 0.0) if apart else 0.0)


def slowest(times: list[float], stages: list[int]) -> tuple[int, float]:
    """The rank that is furthest behind the median of its stage, and by how many seconds."""
    usual = {stage: median_low(t for t, s in zip(times, stages) if s == stage) for stage in set(stages)}
    late = [t - usual[stage] for t, stage in zip(times, stages)]
    rank = max(range(len(late)), key=late.__getitem__)
    return rank, late[rank]
