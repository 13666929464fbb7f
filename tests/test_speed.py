"""The speed table's command on a CPU: a row of the same form gives figures, each row is a run that fits an H200."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from configs.schema import micro_batches
from launch import bench, plan
from launch.cluster import GPUS, Cluster
from launch.rows import ROWS, Row

TINY = next(r for r in ROWS if r.name == "tiny")


@pytest.mark.parametrize("row", [r for r in ROWS if r.gpus], ids=lambda r: r.name)
def test_each_row_is_a_run_that_fits(row):
    for run in [row, row.twin] if row.twin else [row]:
        cfg = plan.read(run.overrides.split(), run.gpus)
        assert plan.plan(cfg, Cluster(run.gpus, GPUS["h200"])).fits, run.name
        assert cfg.train.global_batch * cfg.data.seq_len >= 65536
    assert row.must < row.aim or not (row.must or row.peers)


@pytest.mark.parametrize(("name", "rows"), [("1gpu", 6), ("2gpu", 6), ("4gpu", 8), ("all", 20)])
def test_rows_are_chosen_by_their_gpus(name, rows, monkeypatch):
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 4)
    assert len(bench.chosen(None, name)) == rows


def test_pipelines_of_two_gpus_have_eight_micro_batches():
    cfg = plan.read(next(r for r in ROWS if r.name == "pp2").overrides.split(), 2)
    assert micro_batches(cfg, 2) == 8


def test_a_row_and_its_twin_give_figures(tmp_path, capsys):
    file = tmp_path / "bench.json"
    assert bench.main(["--row", "tiny", "--steps", "6", "--every", "2", "--json", str(file)]) == 0
    sparse, full = json.loads(file.read_text())
    assert (sparse["row"], full["row"]) == ("tiny", "tiny, full")
    for found in (sparse, full):
        assert found["ended"] == "done"
        assert found["intervals"] == 2
        assert found["slowest"] <= found["tokens_per_s"] <= found["fastest"]
        assert found["tokens_per_s"] == pytest.approx(8 * 128 / found["step_s"], rel=0.5)
        assert found["peak_gib"] > 0
        assert found["plan_gib"] > 0
        assert found["environment"]["world"] == 1
    assert "tiny, full" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_that_take_too_long_are_ended():
    mark = f"seed={os.getpid()}"
    found = bench.measure(Row("slow", 2, f"{TINY.overrides} {mark}"), 100_000, 1, 15.0)
    assert found["ended"] == "after the limit of 15 s"
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # of a process that ended meanwhile
            commands.append(path.read_text())
    assert len(commands) > 1
    assert not [c for c in commands if mark in c], "a process is left"


def test_a_row_that_fails_is_told(monkeypatch, tmp_path, capsys):
    broken = Row("tiny", 0, TINY.overrides.replace("model.kv_heads=2", "model.kv_heads=3"))
    monkeypatch.setattr(bench, "ROWS", [broken])
    monkeypatch.setattr(bench, "planned", lambda row: 0.0)  # which would be refused as the run is
    assert bench.main(["--row", "tiny", "--no-twins", "--json", str(tmp_path / "b.json")]) == 70
    said = capsys.readouterr()
    assert "model.heads=8" in said.out
    assert "error: row tiny: gave no figures" in said.err


MISTAKES = [
    ("--row nothing", "no such row"),
    ("--rows 2gpu", "needs 2 GPUs"),
    ("--rows 4gpu", "needs 4 GPUs"),
    ("--row tiny --steps 5 --every 5", "two intervals"),
    ("--row tiny --json /dev/null/b.json", "not writable"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES)
def test_a_mistake_is_one_line(line, says, monkeypatch, capsys):
    monkeypatch.setattr(bench.torch.cuda, "device_count", lambda: 0)
    assert bench.main(line.split()) == 64
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error
