"""F27: one rank needs 0.2 s more for each step. Nothing fails or changes; within 50 steps the log says who it is."""

import re

import pytest

from launch.stragglers import Stragglers, own, slowest
from parallel import mesh
from tests import ranks
from tests.faults.faulty import faulty, same
from tests.test_train import lines, train

STEPS = ["train.steps=12", "train.micro_batch=1", "checkpoint.every=0"]


@pytest.mark.parametrize("kind", ["late", pytest.param("slow forward", marks=pytest.mark.slow)])
def test_a_slow_rank_is_named(corpus, tmp_path, kind):
    process = faulty(corpus, tmp_path, f"{kind}:1:2", *STEPS)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    found = [line for line in said.splitlines() if "holds the others up" in line]
    assert len(found) == 1, said
    rank, late = re.search(r"rank (\d+) \(host \S+\) holds the others up: ([\d.]+) s a step", found[0]).groups()
    assert rank == "1"
    assert 0.15 < float(late) < 0.6
    last = lines(tmp_path / "run")[12]
    assert last["slowest_rank"] == 1
    assert last["slowest_by_s"] > 0.15
    whole = tmp_path / "whole"
    train(corpus, whole, *STEPS, processes=2)
    same(tmp_path / "run", whole)


def looks(late: list[float]) -> list[str]:
    """What rank 0 has to say while rank 2 of four needs 1 s before it waits, and so much more, in steps of 2 s."""
    place = mesh.build(1, 1)
    stragglers, news = Stragglers(place), []
    for more in late:
        stragglers.look(1.0 + more * (place.rank == 2), {"time/forward_s": 0.1}, 2.0)
        news.append(stragglers.news)
    return news


def test_it_is_said_once_and_only_of_one_that_is_slow_for_long():
    news = ranks.run(4, looks, [0.0] * 5 + [0.3] + [0.1] * 9 + [0.3] * 6 + [0.0] * 6)[0]
    assert [i for i, said in enumerate(news) if said] == [17, 23], news
    assert re.fullmatch(r"warning: rank 2 \(host .*\) holds the others up: 0.300 s a step more than its like", news[17])
    assert news[23] == "rank 2 is as fast as the others again"


def test_backward_counts_only_where_no_wait_is_in_it():
    parts = {"time/forward_s": 1.0, "time/backward_s": 2.0, "time/optimizer_s": 4.0}
    assert own(parts) == 1.0
    assert own({**parts, "time/reduce_gradients_s": 8.0}) == 3.0


def test_stages_are_not_compared_with_one_another():
    assert slowest([1.0, 1.1, 5.0, 5.0], [0, 0, 1, 1]) == (1, pytest.approx(0.1))
    assert slowest([1.0, 5.0], [0, 1]) == (0, 0.0), "alone in a stage nobody is slow"
