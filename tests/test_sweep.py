"""Multirun: what runs, where, in what order, and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from configs.schema import Kind
from launch import sweep
from launch.compose import compose_all, from_text
from launch.stop import Stop
from tests.test_compose import NEEDED
from tests.test_train import lines, train


def planned(monkeypatch, *overrides: str) -> list[sweep.Job]:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *NEEDED, *overrides])
    return sweep.plan(compose_all(1))


def places(jobs: list[sweep.Job]) -> list[str]:
    return [str(job.directory) for job in jobs]


def test_every_combination_in_order_each_in_a_place_of_its_own(monkeypatch):
    jobs = planned(monkeypatch, "attention.n=8,16", "seed=0,1", "run.dir=runs/my n")
    assert places(jobs) == [f"runs/my n/attention.n-{n}_seed-{seed}" for n in (8, 16) for seed in (0, 1)]
    assert jobs[1].overrides == [*NEEDED, "attention.n=8", "seed=1", 'run.dir="runs/my n/attention.n-8_seed-1"']
    assert "-m" not in jobs[0].overrides


def test_the_overrides_of_a_job_make_its_run(monkeypatch):
    for job in planned(
        monkeypatch, "attention.branches=[cmp,win],[slc,win,cmp]", "run.dir='a, \"b\"'", "twin=null,full"
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *job.overrides])
        from launch.compose import compose

        cfg = from_text(compose(1))
        assert cfg.run.dir == str(job.directory)
        assert (cfg.attention.kind is Kind.full) == (cfg.twin is not None) == job.directory.name.endswith("-full")


def test_the_same_command_has_the_same_place_and_another_one_another(monkeypatch):
    first, again, other = (places(planned(monkeypatch, f"seed={s}")) for s in ("0,1", "0,1", "0,2"))
    assert first == again
    assert not set(first) & set(other)


def test_one_run_is_a_sweep_too(monkeypatch):
    assert places(planned(monkeypatch, "seed=3", "run.dir=a")) == ["a/run"]
    assert places(planned(monkeypatch, "twin=null,full", "run.dir=a")) == ["a/run", "a/run-full"]


def test_hydra_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    planned(monkeypatch, "seed=0,1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [p.stem for p in sorted((sweep.ROOT / "configs/experiment").glob("abl*.yaml"))])
def test_each_ablation_is_a_sweep(monkeypatch, name):
    params = yaml.safe_load((sweep.ROOT / f"configs/experiment/{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    jobs = planned(monkeypatch, f"experiment={name}")
    assert len(jobs) == len(next(iter(params.values())).split(","))
    assert all(job.directory.parent.name.startswith(name) for job in jobs)


def test_the_papers_ablations_are_there(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *NEEDED, "experiment=ablate_branches"])
    branches = [[b.value for b in from_text(text).attention.branches] for _, text in compose_all(1)]
    assert branches[2:] == [["slc", "win"], ["cmp", "win"], ["cmp", "slc"]]
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *NEEDED, "experiment=ablate_blocks"])
    sizes = [from_text(text).attention for _, text in compose_all(1)]
    assert {a.l_slc * a.n for a in sizes} == {1024}
    assert [a.l_slc for a in sizes] == [64, 32, 64, 128]


MISTAKES = [
    (["seed=0,0"], "two runs"),
    (["run.dir=a,b"], "run.dir"),
    (["train.global_batch=4,3"], "train.global_batch=3"),
    (["hydra.sweep.dir=x", "seed=0,1"], "give run.dir=DIR"),
]


@pytest.mark.parametrize(("overrides", "says"), MISTAKES, ids=str)
def test_a_mistake_in_any_run_is_said_before_the_first(monkeypatch, overrides, says):
    with pytest.raises(ConfigError, match=says):
        planned(monkeypatch, *overrides)


def test_a_sweep_trains_the_twin_on_the_same_batches_and_ends_with_the_comparison(corpus, tmp_path):
    folder = tmp_path / "s"
    done = train(corpus, folder, "-m", "train.steps=2", "twin=null,full")
    assert "run against run-full at 128 tokens of context" in done.stdout
    assert "<svg" in (folder / "compare.html").read_text()
    nsa, full = folder / "run", folder / "run-full"
    configs = [yaml.safe_load((run / "config.yaml").read_text()) for run in (nsa, full)]
    assert [c["attention"]["kind"] for c in configs] == ["nsa", "full"]
    assert configs[0]["seed"] == configs[1]["seed"]
    assert lines(nsa)[1]["padding"] == lines(full)[1]["padding"]
    before = (nsa / "metrics.jsonl").read_text()
    assert "run against run-full" in train(corpus, folder, "-m", "train.steps=2", "twin=null,full").stdout
    assert (nsa / "metrics.jsonl").read_text() == before, "what is done is not done again"


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Commands of the runs, which leave with the code that their last override names, or wait for a signal."""
    commands = []
    real = subprocess.Popen

    def popen(command, **options):
        commands.append(command)
        return real([sys.executable, "-c", PROGRAM, command[-1]], **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    return commands


PROGRAM = """
import os, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: got.append(1))
if sys.argv[1].isdigit():
    sys.exit(int(sys.argv[1]))
os.kill(os.getppid(), int(getattr(signal, sys.argv[1])))
end = time.time() + 30
while time.time() < end and not got:
    time.sleep(0.02)
time.sleep(0.5)
sys.exit(len(got))
"""


def jobs_that(tmp_path: Path, *endings: str) -> list[sweep.Job]:
    return [sweep.Job(tmp_path / str(i), [ending]) for i, ending in enumerate(endings)]


def test_a_diverged_run_is_a_result_and_a_failed_one_is_the_end(monkeypatch, tmp_path, started, capfd):
    compared = []
    monkeypatch.setattr(sweep.compare, "compare", lambda runs, output: compared.append((runs, output.name)))
    assert sweep.run_all(jobs_that(tmp_path, "0", "76", "0"), 1, Stop()) == 76
    assert compared == [([str(tmp_path / "0"), str(tmp_path / "2")], "compare.html")]
    assert sweep.run_all(jobs_that(tmp_path, "0", "65", "0"), 1, Stop()) == 65
    assert len(started) == 5
    assert len(compared) == 1
    assert "left with exit code 65" in capfd.readouterr().err


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGINT", 0)])
def test_a_request_to_stop_reaches_the_run_once_and_ends_the_sweep(tmp_path, started, number, code):
    assert sweep.run_all(jobs_that(tmp_path, number, "0"), 1, Stop()) == code
    assert len(started) == 1


def test_several_processes_start_the_launcher(tmp_path, started):
    sweep.run_all(jobs_that(tmp_path, "65"), 4, Stop())
    assert started[0][:3] == [str(sweep.ROOT / "launch/local.sh"), "-n", "4"]
