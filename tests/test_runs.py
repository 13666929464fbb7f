"""Reading run directories: half-written files, restarts, time, health."""

import json

import pytest

from configs.errors import CheckpointError
from launch import runs
from tests.test_compare import make_run


def test_a_resumed_run_counts_each_step_once_and_a_half_line_not_at_all(tmp_path):
    path = tmp_path / "a"
    make_run(path, "nsa", 3000.0)
    with open(path / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 20, "tokens": 20 * 4096, "loss": 1.5, "mem_gib": 1}) + '\n{"step": 21, "lo')
    run = runs.read(path)
    assert len(run.steps) == 20
    assert run.steps[-1]["loss"] == 1.5


def test_time_counts_the_steps_between_logged_ones(tmp_path):
    path = tmp_path / "a"
    make_run(path, "nsa", 1.0)
    logged = [{"step": step, "tokens": step, "loss": 1.0, "step_s": 2.0, "mem_gib": 1} for step in (5, 10, 12)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in logged))
    assert runs.read(path).seconds() == [10.0, 20.0, 24.0]


def test_health_by_measure_and_layer(tmp_path):
    make_run(tmp_path / "a", "nsa", 1.0, health=True)
    expected = [(10 * 4096, [0.25, 0.5]), (20 * 4096, [0.25, 0.5])]
    assert runs.read(tmp_path / "a").sparsity() == {"gate_cmp": expected}


def test_find(tmp_path):
    for name in ("b", "a"):
        make_run(tmp_path / "sweep" / name, "nsa", 1.0)
    assert [p.name for p in runs.find(str(tmp_path / "sweep"))] == ["a", "b"]
    assert [p.name for p in runs.find(str(tmp_path / "sweep" / "b"))] == ["b"]
    (tmp_path / "empty").mkdir()
    for path in ("empty", "absent"):
        with pytest.raises(CheckpointError):
            runs.find(str(tmp_path / path))


def test_an_option_that_an_older_version_did_not_have_is_as_by_default(tmp_path):
    make_run(tmp_path / "a", "nsa", 1.0)
    config = runs.read(tmp_path / "a").config
    assert config["model"]["dim"] == 64
    assert config["model"]["tie_embeddings"] is config["deterministic"] is False
    assert config["parallel"]["recompute"] == "none"
