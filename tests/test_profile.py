"""profile.steps: a trace of those steps and no others."""

import json

import pytest
import torch

from configs.errors import ConfigError
from configs.rules import check
from launch.profile import Trace
from tests import tiny


def trace(tmp_path, steps, until: int):
    """Steps 1 to `until`, each with a product of as many rows; the sizes of the products that were recorded."""
    made = Trace(tiny.config(run__dir=str(tmp_path), profile__steps=steps), rank=3)
    for step in range(1, until + 1):
        made.before(step)
        torch.ones(step, 7) @ torch.ones(7, 5)
        made.after(step, end=step == until)
    return made.path


def rows(path) -> list[int]:
    events = json.loads(path.read_text())["traceEvents"]
    return [e["args"]["Input Dims"][0][0] for e in events if e.get("name") == "aten::mm"]


def test_the_steps_named_and_no_others(tmp_path):
    path = trace(tmp_path, [2, 3], 5)
    assert path.name == "steps-2-3-rank-00003.json"
    assert rows(path) == [2, 3]


def test_a_run_that_ends_early_writes_what_it_has(tmp_path):
    assert rows(trace(tmp_path, [2, 9], 4)) == [2, 3, 4]


@pytest.mark.parametrize("steps", [None, [7, 8]])
def test_without_such_steps_nothing_is_written(tmp_path, steps):
    trace(tmp_path, steps, 4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [[3], [0, 2], [5, 4], [1, 2, 3], [11, 12]])
def test_what_is_no_span_is_refused(steps):
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        check(tiny.config(profile__steps=steps, train__steps=10), 1)
