"""F11, F12: disks that are full or take nothing. One line, code 66, on all ranks; what was published stays."""

import json
import os
import resource
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from configs.errors import CheckpointError
from configs.schema import Config, OnSaveError
from parallel import checkpoint
from tests import ranks, tiny
from tests.disks import mount
from tests.test_checkpoint import build, saver, state, steps
from tests.test_train import command, errors, lines, train


def room(size: int) -> None:
    """Let this process make no file longer than so many bytes; -1: as long as it likes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_for_a_while(cfg: Config, rank: int) -> tuple[str, list[str], list[str], list[dict]]:
    """A save that one rank has no room for, and one after there is."""
    place, loader, engine = build(cfg)
    keeper, reports = saver(cfg, place, engine)
    keeper.save(1, state(cfg, step=1))
    keeper.wait()
    steps(1, place, loader, engine)
    room(20_000 if place.rank == rank else -1)
    said = ""
    try:
        keeper.save(2, state(cfg, step=2))
        steps(1, place, loader, engine, 1)
        keeper.wait()
    except CheckpointError as e:
        said = str(e)
    room(-1)
    left = sorted(p.name for p in keeper.root.iterdir())
    keeper.save(3, state(cfg, step=3))
    keeper.wait(last=True)
    return said, left, checkpoint.published(Path(cfg.run.dir)), reports


@pytest.mark.parametrize(("rank", "asynchronous"), [(1, True), (0, False)])
def test_a_disk_that_is_full_for_one_rank(corpus, tmp_path, rank, asynchronous):
    cfg = tiny.config(data__path=corpus, run__dir=str(tmp_path / "run"), model__layers=2)
    cfg = tiny.change(cfg, checkpoint__asynchronous=asynchronous, checkpoint__every=1)
    for said, left, published, _ in ranks.run(2, full_for_a_while, cfg, rank, timeout=60):
        assert f"step-00000002: rank {rank}:" in said
        assert "bytes are free there" in said
        assert left == ["step-00000001"], "nothing half-written stays"
        assert [Path(p).name for p in published] == ["step-00000003", "step-00000001"]


def test_a_save_that_fails_can_be_skipped_but_not_the_last(corpus, tmp_path):
    cfg = tiny.config(data__path=corpus, run__dir=str(tmp_path / "run"), model__layers=2)
    cfg = tiny.change(cfg, checkpoint__on_error=OnSaveError.skip, checkpoint__every=1)
    for said, _, published, reports in ranks.run(2, full_for_a_while, cfg, 1, timeout=60):
        assert said == ""
        assert ["save_failed" in r for r in reports] == [False, True, False]
        assert [Path(p).name for p in published] == ["step-00000003", "step-00000001"]


def test_a_full_disk_ends_a_run_with_one_line_and_keeps_what_was_published(corpus, small_disk):
    run = small_disk / "run"
    (line,) = errors(train(corpus, run, "train.steps=6", "checkpoint.every=2", processes=2, code=66))
    assert "no room for" in line
    assert "bytes are free there" in line
    assert list((run / "checkpoints").iterdir()) == []
    assert max(lines(run)) < 6, "it does not train on for nothing"


def test_a_disk_that_fills_up_under_a_run(corpus, small_disk):
    """Lines of the log wait for room; the checkpoint does not."""
    run = small_disk / "run"
    started = command(corpus, run, "train.steps=60")
    process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last = ""
    for line in process.stdout:
        if line.startswith("step      3/"):
            with suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as f:
                while True:
                    f.write(bytes(100))
        last = last if line.startswith("ends with code 66") else line
    said = process.stderr.read()
    assert process.wait(60) == 66
    assert said.count("metrics may be missing") == 1
    assert sum(line.startswith("error: ") for line in said.splitlines()) == 1
    assert "Traceback" not in said
    assert last.startswith(("step     60/", "warning: no checkpoint of step 60"))
    text = (run / "metrics.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines()[:-1])


@pytest.mark.slow
def test_a_run_that_may_skip_saves_trains_to_its_end_but_does_not_end_well(corpus, small_disk):
    options = ["train.steps=4", "checkpoint.every=2", "checkpoint.on_error=skip"]
    done = train(corpus, small_disk / "run", *options, code=66)
    assert "no checkpoint of step 2" in done.stdout
    assert max(lines(small_disk / "run")) == 4
    assert [m["step"] for m in lines(small_disk / "run", "save_failed").values()] == [2, 4]


@pytest.mark.parametrize("how", ["a file in its place", pytest.param("read only", marks=pytest.mark.slow)])
def test_a_place_that_takes_nothing_is_known_before_the_first_step(corpus, tmp_path, how):
    run = tmp_path / "run"
    run.mkdir()
    if how == "read only":
        mount(run, "ro")
    else:
        (run / "checkpoints").write_text("")
    try:
        done = train(corpus, run, "train.steps=2", processes=2, code=66)
    finally:
        subprocess.run(["umount", str(run)], capture_output=True, check=False)
    (line,) = errors(done)
    assert str(run / "checkpoints") in line
    assert "step " not in done.stdout


@pytest.mark.slow
def test_no_right_to_write_is_known_before_the_first_step(corpus, tmp_path):
    """By root too, once it has given up the power to write anywhere."""
    (tmp_path / "closed").mkdir(mode=0o555)
    humbly = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    started = [*humbly, *command(corpus, tmp_path / "closed" / "run", "train.steps=2")]
    done = subprocess.run(started, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 66, done.stdout + done.stderr
    (line,) = errors(done)
    assert "PermissionError" in line
