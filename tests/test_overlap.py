"""Gradients that are reduced during backward: means of all ranks, started early, in one order on all of them."""

import pytest
import torch
import torch.distributed as dist

from configs.schema import Precision
from parallel import overlap
from parallel.mesh import build
from parallel.overlap import Reducer
from tests import ranks, tiny
from tests.test_parity import train

SIZES = [[4, 3, 6, 2], [1, 1]]
PIECES = [8, 7, 2]  # from the end of each group, at least five elements


def reduced(adds: dict[int, list[tuple[int, int]]]) -> tuple[list, list[int], list[int]]:
    """Flat gradients after a step of two micro-batches, elements of what started, how many had before `finish`."""
    place, sent = build(1, 1), []
    flat = [torch.arange(float(sum(s) + 1)) * (place.rank + 1) for s in SIZES]  # and one of padding
    overlap.PIECE = 5
    made, real = Reducer(flat, SIZES, place.dp, 2), dist.all_reduce

    def all_reduce(x, *args, **kwargs):
        sent.append(x.numel())
        return real(x, *args, **kwargs)

    dist.all_reduce = all_reduce
    early = []
    for _ in range(2):  # the second step begins anew
        for at in adds[place.rank]:
            made.added(*at)
        early.append(len(sent))
        made.finish()
    return [f.tolist() for f in flat], sent, early


EVERY = [(g, i) for g in (0, 1) for i in reversed(range(len(SIZES[g])))]


def test_pieces_are_means_and_start_early():
    for flat, sent, early in ranks.run(2, reduced, dict.fromkeys((0, 1), EVERY * 2)):
        assert sent == PIECES * 2
        assert early == [3, 6]
        for f, numbers in zip(flat, SIZES):
            assert f[:-1] == [1.5 * x for x in range(sum(numbers))]


def test_ranks_that_are_ready_in_another_order_start_in_the_same():
    some = [at for at in EVERY if at != (0, 2)]  # which has no gradient there
    (_, first, early), (_, second, late) = ranks.run(2, reduced, {0: EVERY[::-1] * 2, 1: some + EVERY})
    assert first == second == PIECES * 2
    assert early == [3, 6]
    assert late == [0, 3]


def started_in_backward(cfg) -> tuple[list, list[float]]:
    """A run's losses and norms, and the share of its reductions that had started when backward ended, of each step."""
    counts, real = [], Reducer.finish

    def finish(self):
        counts.append(len(self.started) / max(1, len(self.pieces)))
        real(self)

    overlap.PIECE, Reducer.finish = 20_000, finish
    return train(cfg, 3), counts


@pytest.mark.parametrize(("world", "layout"), [(2, {}), (4, {"pp": 2}), (4, {"tp": 2, "sequence": True})], ids=str)
def test_runs_in_bf16_are_those_of_one_process(corpus, world, layout):
    cfg = tiny.config("nsa", data__path=corpus, train__precision=Precision.bf16)
    ((expected, _),) = ranks.run(1, started_in_backward, cfg)
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out, started in ranks.run(world, started_in_backward, cfg):
        for ours, theirs in zip(out, expected):
            assert ours == pytest.approx(theirs, rel=0.01)
        assert started == [1.0] * 3
