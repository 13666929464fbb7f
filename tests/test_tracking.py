"""W&B beside a run: one run through every restart and upload, each line once; a server that fails costs no step."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest
import wandb
import yaml

from configs.schema import WandbMode
from launch import tracking, upload
from tests.test_compare import make_run
from tests.test_train import ROOT, command, lines, train
from tests.tiny import config
from tests.wandb_server import KEY, serve

NOBODY = "http://127.0.0.1:9"  # the discard port, on which nothing listens
LIMIT = 4  # seconds, wandb.timeout of these runs
ONLINE = ["wandb.mode=online", f"wandb.timeout={LIMIT}"]


@pytest.fixture(autouse=True)
def _fresh_client():
    """W&B's client in this process keeps the server that it began with."""
    yield
    wandb.teardown()


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(rows: list[dict], run: Path) -> None:
    """W&B has the lines of metrics.jsonl, in order, each once."""
    expected = logged(run)
    assert [row["_step"] for row in rows] == list(range(len(expected)))
    for row, line in zip(rows, expected):
        assert {k: row[k] for k in ("step", "tokens", "loss") if k in line} == {
            k: line[k] for k in ("step", "tokens", "loss") if k in line
        }


def test_one_wandb_run_through_a_kill_and_a_restart(corpus, tmp_path):
    run = tmp_path / "a-full"
    options = ["attention=full", "train.steps=40", "checkpoint.every=4", *ONLINE]
    with serve() as server:
        env = {**os.environ, **server.environment}
        started = subprocess.Popen(command(corpus, run, *options), stdout=subprocess.PIPE, text=True, env=env)
        for line in started.stdout:
            if line.startswith("step     10/"):
                started.send_signal(signal.SIGKILL)
        started.wait(60)
        killed_at = len(logged(run))
        (run / "wandb_id").unlink()  # the checkpoint knows it too
        train(corpus, run, *options, env=server.environment)
        (name,) = server.runs
        assert (run / "wandb_id").read_text() == name
        assert len(logged(run)) > 41 >= killed_at, "steps after the checkpoint were done again"
        same(server.history(name), run)
        told = server.runs[name]
        assert (told["groupName"], told["jobType"], server.ends[name]) == ("a", "full", 0)
        config = {k: v["value"] for k, v in json.loads(told["config"]).items()}
        assert config["attention"]["kind"] == "full"
        environment = json.loads((run / "environment.json").read_text())
        assert config["environment"]["data_fingerprint"] == environment["data_fingerprint"]
        assert config["environment"]["commit"] == environment["commit"]
        axes = config["_wandb"]["m"]
        assert {"1": "tokens", "6": [3], "7": []} in axes, "tokens are the axis"
        assert any(axis.get("2") == "*" and axis.get("5") == 1 for axis in axes), "of everything"


@pytest.mark.parametrize("kind", [pytest.param("silent", marks=pytest.mark.slow), "falls silent"])
def test_a_server_that_does_not_answer_costs_no_step_and_little_at_the_end(corpus, tmp_path, kind):
    run = tmp_path / "run"
    with serve() as server:
        server.silent = kind == "silent"
        started = subprocess.Popen(
            command(corpus, run, "train.steps=60", *ONLINE),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **server.environment},
        )  # fmt: skip
        for line in started.stdout:
            server.silent |= line.startswith("step     30/")
            last = time.monotonic()
        assert started.wait(60) == 0
        ending = time.monotonic() - last
        steps = [m["step_s"] for m in lines(run).values()]
        print(f"{kind}: {median(steps):.4f} s a step, {max(steps):.4f} at the most, {ending:.1f} s to end")
        assert len(steps) == 60
        assert max(steps) < LIMIT / 2, "a step has waited for the server"
        assert ending < 2 * LIMIT + 5
        assert ("W&B is off: " in started.stderr.read()) == (kind == "silent")
    with serve() as server:
        later = [sys.executable, "-m", "launch.upload", str(run)]
        subprocess.run(later, cwd=ROOT, env={**os.environ, **server.environment}, timeout=60, check=True)
        same(server.history((run / "wandb_id").read_text()), run)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dies", "429"])
def test_a_server_that_dies_or_has_enough_costs_no_step_and_nothing_is_lost(corpus, tmp_path, kind):
    run = tmp_path / "run"
    with serve() as server:
        started = subprocess.Popen(
            command(corpus, run, "train.steps=60", *ONLINE),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **server.environment},
        )  # fmt: skip
        for line in started.stdout:
            if line.startswith("step     30/") and kind == "dies":
                server.shutdown()
                server.server_close()
            elif line.startswith("step     30/"):
                server.status = 429
            last = time.monotonic()
        assert started.wait(60) == 0
        assert time.monotonic() - last < 2 * LIMIT + 5
    steps = [m["step_s"] for m in lines(run).values()]
    assert len(steps) == 60
    assert max(steps) < LIMIT / 2, "a step has waited for the server"
    with serve() as server:
        later = [sys.executable, "-m", "launch.upload", str(run)]
        subprocess.run(later, cwd=ROOT, env={**os.environ, **server.environment}, timeout=60, check=True)
        same(server.history((run / "wandb_id").read_text()), run)


def test_without_the_package_a_run_is_made_all_the_same(tmp_path, monkeypatch):
    make_full_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python has it that a module is not to be found
    said: list[str] = []
    tracking.Tracker(config(run__dir=str(tmp_path / "run")), said.append).finish(0)
    (line,) = said
    assert re.match("warning: W&B is off: .*wandb", line)
    assert "pip install wandb" in line


def fill(disk: Path) -> None:
    """Until there is no byte left."""
    with suppress(OSError), open(disk / "filler", "wb", buffering=0) as f:
        while True:
            f.write(bytes(100))


@pytest.mark.parametrize("mode", ["offline", pytest.param("online", marks=pytest.mark.slow)])
def test_a_disk_that_fills_up_under_what_it_keeps_costs_no_step_and_nothing_is_lost(corpus, tmp_path, small_disk, mode):
    run = tmp_path / "run"
    with serve() as server:
        env = {**os.environ, **server.environment, "WANDB_DIR": str(small_disk)}
        options = ["train.steps=60", f"wandb.mode={mode}", f"wandb.timeout={LIMIT}"]
        started = subprocess.Popen(
            command(corpus, run, *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        for line in started.stdout:
            if line.startswith("step     10/"):
                end = time.monotonic() + 60
                while not list(small_disk.glob("wandb/*/*.wandb")):  # a thread begins it
                    assert time.monotonic() < end, "it was never begun"
                    time.sleep(0.01)
                fill(small_disk)
            last = time.monotonic()
        said = started.stderr.read()
        assert started.wait(60) == 0
        assert time.monotonic() - last < 2 * LIMIT + 5
        assert len(said.splitlines()) <= 1, said
        assert said == "" or said.startswith("warning: W&B is off: ")
        steps = [m["step_s"] for m in lines(run).values()]
        assert len(steps) == 60
        assert max(steps) < LIMIT / 2, "a step has waited for the disk"
        later = [sys.executable, "-m", "launch.upload", str(run)]
        subprocess.run(later, cwd=ROOT, env={**os.environ, **server.environment}, timeout=60, check=True)
        same(server.history((run / "wandb_id").read_text()), run)


def test_a_full_disk_for_what_it_keeps_turns_it_off_with_a_line(tmp_path, monkeypatch, capfd, small_disk):
    make_full_run(tmp_path / "run")
    fill(small_disk)
    monkeypatch.setenv("WANDB_DIR", str(small_disk))
    said: list[str] = []
    begin = time.monotonic()
    cfg = config(run__dir=str(tmp_path / "run"), wandb__mode=WandbMode.offline, wandb__timeout=LIMIT)
    tracking.Tracker(cfg, said.append).finish(0)
    assert time.monotonic() - begin < 2 * LIMIT + 5
    wandb.teardown()  # it has files open there
    (line,) = said
    assert line.startswith("warning: W&B is off: ")
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["refuses", "answers 500", "answers 401 to a bad key"])
def test_a_server_that_fails_turns_it_off_with_a_line(tmp_path, monkeypatch, kind):
    make_full_run(tmp_path / "run")
    said: list[str] = []
    with serve() as server:
        server.status = 401 if "401" in kind else 500
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", server.environment["WANDB_BASE_URL"] if kind != "refuses" else NOBODY)
        cfg = config(run__dir=str(tmp_path / "run"), wandb__mode=WandbMode.online, wandb__timeout=1.0)
        begin = time.monotonic()
        tracker = tracking.Tracker(cfg, said.append)
        assert time.monotonic() - begin < 0.5, "it waits in a thread of its own"
        tracker.finish(0)
        assert time.monotonic() - begin < 5
    (line,) = said
    assert line.startswith("warning: W&B is off: ")
    assert f"python -m launch.upload {tmp_path / 'run'}" in line


def test_an_offline_run_is_uploaded_once_and_what_came_since_then(tmp_path, monkeypatch, capfd):
    for name in ("one", "two"):
        make_full_run(tmp_path / "sweep" / name)
    with serve() as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        assert upload.main([str(tmp_path / "sweep")]) == 0
        assert "one: 21 lines sent, 0 were there" in capfd.readouterr().out
        one = tmp_path / "sweep" / "one"
        with open(one / "metrics.jsonl", "a") as f:
            f.write('{"step": 21, "tokens": 86016, "loss": 1.5}\n{"step": 22, "to')
        assert upload.main([str(one)]) == 0
        assert "one: 1 lines sent, 21 were there" in capfd.readouterr().out
        assert len(server.runs) == 2
        assert len(server.history((one / "wandb_id").read_text())) == 22


def make_full_run(path: Path) -> None:
    """A run directory as train.py leaves it."""
    make_run(path, "nsa", 3000.0)
    config = yaml.safe_load((path / "config.yaml").read_text())
    config |= {"wandb": {"project": "p"}, "parallel": {"tp": 1, "pp": 1, "zero": 1}, "experiment": "e"}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps({**environment, "commit": "abc"}))


def test_upload_says_in_a_line_what_is_wrong(tmp_path, monkeypatch, capfd):
    make_full_run(tmp_path / "run")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert upload.main([str(tmp_path / "run")]) == 64
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", NOBODY)
    assert upload.main([str(tmp_path / "absent")]) == 66
    assert upload.main([str(tmp_path / "run"), "--timeout", "2"]) == 75
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "wandb login" in errors[0]
    assert "same command again" in errors[2]


REFUSALS = [(401, KEY, 64), (403, KEY, 64), (404, KEY, 64), (200, "short", 64), (500, KEY, 75)]


@pytest.mark.parametrize(("status", "key", "code"), REFUSALS, ids=str)
def test_only_what_may_go_well_another_time_is_to_be_tried_again(tmp_path, monkeypatch, capfd, status, key, code):
    make_full_run(tmp_path / "run")
    with serve() as server:
        server.status = status
        for name, value in {**server.environment, "WANDB_API_KEY": key}.items():
            monkeypatch.setenv(name, value)
        assert upload.main([str(tmp_path / "run"), "--timeout", "2"]) == code
        (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert ("WANDB_API_KEY), and" in error) == (code == 64)
        assert ("same command again" in error) == (code == 75)
        wandb.teardown()  # as if in another process
        server.status = 200
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert upload.main([str(tmp_path / "run")]) == 0
    assert "21 lines sent, 0 were there" in capfd.readouterr().out


def test_lines_of_a_file_that_grows(tmp_path):
    path = tmp_path / "m"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    lines = tracking.Lines(path, skip=1)
    assert list(lines) == [{"a": 2}]
    with open(path, "a") as f:
        f.write(": 3}\n")
    assert list(lines) == [{"a": 3}]
    assert list(lines) == []
