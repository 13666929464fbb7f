"""Runs on a real slurm of two nodes, which `pytest -m slurm` starts: preempted, warned, cancelled, queued again."""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests import slurm
from tests.test_train import ROOT, SMALL, lines, train

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))]
STEPS = 300
RUN = 'runs of mine/it\'s "a" run'
TWO_NODES = ["--nodes=2", "--gpus-per-node=2"]
TASKS = "--ntasks-per-node=2"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def place(tmp_path, cluster, monkeypatch) -> Path:
    """A folder to submit from, with the Python of these tests first in the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cluster.env, "PATH", f"{Path(sys.executable).parent}:{cluster.env['PATH']}")
    monkeypatch.setitem(cluster.env, "SPARSETRON_HOME", str(ROOT))
    return tmp_path


def options(corpus: str, run: str = RUN) -> list[str]:
    quoted = run.replace('"', r"\"")
    return [*SMALL, "train.micro_batch=1", f"train.steps={STEPS}", f"data.path={corpus}", f'run.dir="{quoted}"']


def submit(cluster, place: Path, *arguments: str, **env: str) -> tuple[str, Path]:
    """A job of launch/slurm.sbatch, from `place`: its number, and the file with what it says."""
    sbatch, overrides = [a for a in arguments if a.startswith("--")], [a for a in arguments if not a.startswith("--")]
    script = str(ROOT / "launch/slurm.sbatch")
    job = cluster("sbatch", "--parsable", f"--chdir={place}", *sbatch, script, *overrides, **env)
    return job, place / f"sparsetron-{job}.out"


def preempt(cluster, job: str) -> None:
    """A job that goes before the others takes both nodes."""
    cluster("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")


def warn(cluster, job: str) -> None:
    """What slurm does five minutes before the time is up."""
    cluster("scancel", "--batch", "--signal=USR1", job)


MODES = {"one supervisor a node": (1, [], preempt), "one task a GPU": (2, [TASKS], warn)}


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_had_to_stop_continues_and_equals_one_that_had_not(cluster, place, corpus, mode):
    a_node, sbatch, interrupt = MODES[mode]
    own = {"SPARSETRON_PROCESSES": str(a_node), "OMP_NUM_THREADS": "1"}
    job, out = submit(cluster, place, *TWO_NODES, *sbatch, *options(corpus), "wandb.mode=offline", **own)
    cluster.until_it_says(out, "step     10/")
    interrupt(cluster, job)
    cluster.starts_again(job)
    stopped = max(lines(place / RUN))
    assert 10 <= stopped < STEPS
    assert json.loads((place / RUN / "exit.json").read_text())["code"] == 75
    assert cluster.until(job, "COMPLETED", "FAILED") == "COMPLETED", out.read_text()

    assert f"continues {RUN}/checkpoints/step-{stopped:08d}" in out.read_text()
    logged = [m["step"] for m in map(json.loads, (place / RUN / "metrics.jsonl").open()) if "loss" in m]
    assert logged == list(range(1, STEPS + 1)), "no step is lost, and none is done twice"
    sessions = [p.name for p in (place / RUN / "wandb").glob("offline-run-*")]
    assert len(sessions) == 2
    assert len({name.rsplit("-", 1)[1] for name in sessions}) == 1, "one W&B run"
    assert list(place.glob(".*.exit")) == []

    equals_one_that_nothing_happened_to(place, corpus, processes=2 * a_node)


def equals_one_that_nothing_happened_to(place: Path, corpus: str, processes: int) -> None:
    whole = place / "whole"
    train(corpus, whole, *options(corpus, "whole"), processes=processes, env={"OMP_NUM_THREADS": "1"})
    assert {s: (m["loss"], m["grad_norm"]) for s, m in lines(place / RUN).items()} == {
        s: (m["loss"], m["grad_norm"]) for s, m in lines(whole).items()
    }
    assert hashes(place / RUN) == hashes(whole)


def hashes(run: Path) -> dict[str, str]:
    """Of the weights and moments in the last checkpoint."""
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/MANIFEST.json").read_text())
    return {name: f["sha256"] for name, f in manifest["files"].items() if name.endswith(".safetensors")}


def rank(number: int, job: str) -> psutil.Process:
    """The process of a rank of a job under supervisors."""
    for p in psutil.process_iter(["cmdline"]):
        if "train.py" in " ".join(p.info["cmdline"] or []) and "-m" not in p.info["cmdline"]:
            env = p.environ()
            if (env.get("RANK"), env.get("SLURM_JOB_ID")) == (str(number), job):
                return p
    raise AssertionError(f"no rank {number} of job {job}")


def test_a_rank_that_is_killed_and_one_that_hangs_are_started_again_in_the_same_job(cluster, place, corpus):
    overrides = [*options(corpus), "checkpoint.every=20", "parallel.timeout=6"]
    job, out = submit(cluster, place, *TWO_NODES, *overrides, SPARSETRON_PROCESSES="1", OMP_NUM_THREADS="1")
    cluster.until_it_says(out, "step     30/")
    rank(1, job).kill()
    cluster.until_it_says(out, "exit code 70; starts again")
    cluster.until_it_says(out, "step    100/")
    rank(1, job).send_signal(signal.SIGSTOP)
    cluster.until_it_says(out, "exit code 71; starts again")
    assert cluster.until(job, "COMPLETED", "FAILED", "PENDING") == "COMPLETED", out.read_text()

    assert "hangs: rank 1 (host " in out.read_text()
    assert out.read_text().count("starts again") == 2, "one of two supervisors says it"
    assert "Restarts=0" in cluster("scontrol", "--oneliner", "show", "job", job)
    equals_one_that_nothing_happened_to(place, corpus, processes=2)


def test_a_cancelled_run_saves_and_stays_cancelled(cluster, place, corpus):
    job, out = submit(cluster, place, *TWO_NODES, *options(corpus), SPARSETRON_PROCESSES="1")
    cluster.until_it_says(out, "step      2/")
    cluster("scancel", job)
    cluster.until(job, "CANCELLED")
    assert json.loads((place / RUN / "exit.json").read_text())["code"] == 75
    assert len(list((place / RUN / "checkpoints").glob("step-*"))) == 1


def test_a_warning_before_the_run_listens_queues_it_again(cluster, place, corpus):
    job, _ = submit(cluster, place, *TWO_NODES, *options(corpus), SPARSETRON_PROCESSES="1")
    cluster.until_it_has_a_step(job)
    warn(cluster, job)
    cluster.until(job, "PENDING")
    assert not (place / RUN / "metrics.jsonl").exists()
    cluster("scancel", job)


def test_a_mistake_is_one_line_and_the_runs_exit_code(cluster, place, corpus):
    job, out = submit(cluster, place, *TWO_NODES, *options(corpus), "parallel.tp=3")
    cluster.until(job, "FAILED")
    (error,) = [line for line in out.read_text().splitlines() if line.startswith("error: ")]
    assert "does not divide the 4 processes" in error
    assert "ExitCode=64:0" in cluster("scontrol", "--oneliner", "show", "job", job)


@pytest.mark.parametrize("sbatch", [[], [TASKS]], ids=MODES)
def test_the_doctor_looks_at_each_node(cluster, place, sbatch):
    doctor = {"SPARSETRON_TRAIN": str(ROOT / "launch/doctor.py"), "SPARSETRON_PROCESSES": "2"}
    job, out = submit(cluster, place, *TWO_NODES, *sbatch, **doctor)
    assert cluster.until(job, "COMPLETED", "FAILED") == "COMPLETED", out.read_text()
    assert "nodes: 2, 4 processes: n0 n1" in out.read_text()
    assert "gloo x 4: all-reduce between all of them" in out.read_text()


def test_a_sweep_is_a_job_array_that_ends_with_its_comparison(cluster, place, corpus):
    folder = place / "my sweep"
    overrides = [o for o in options(corpus, folder.name) if not o.startswith("attention.n=")]
    small = ["--oversubscribe", "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    program = [sys.executable, "-m", "launch.submit", *small, "-m", "attention.n=4,5", "seed=0,1", *overrides]
    runs = [folder / f"attention.n-{n}_seed-{seed}" for n in (4, 5) for seed in (0, 1)]
    said = cluster(*program, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    array, comparison = (line.split(":")[0].split()[-1] for line in said.splitlines())

    cluster.until_it_says(folder / "array/1.out", "step      2/")
    cluster("scontrol", "requeue", f"{array}_1")
    cluster("scancel", f"{array}_3")
    cluster.until(f"{array}_0", "COMPLETED")
    cluster.until(f"{array}_2", "COMPLETED")
    assert cluster.state(f"{array}_1") == "PENDING"
    assert cluster.state(comparison) == "PENDING", "it waits for the run that is queued again"
    cluster.starts_again(f"{array}_1")
    cluster.until(f"{array}_1", "COMPLETED")
    cluster.until(comparison, "COMPLETED")
    assert [max(lines(run)) for run in runs[:3]] == [STEPS] * 3
    compared = (folder / "array/compare.out").read_text()
    assert f"left out: {runs[3]}: " in compared
    assert all(run.name in (folder / "compare.html").read_text() for run in runs[:3])


PROGRAM = """
import json, os, pathlib, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "SLURM_NODEID")
seen = {name: os.environ[name] for name in names}
seen |= {"cpus": len(os.sched_getaffinity(0)), "given": sys.argv[1:]}
pathlib.Path(os.environ["SLURM_SUBMIT_DIR"], "rank" + seen["RANK"]).write_text(json.dumps(seen))
"""


@pytest.mark.parametrize("sbatch", [[], [TASKS]], ids=MODES)
def test_every_rank_has_its_place_all_processors_and_the_arguments_as_they_are(cluster, place, sbatch):
    (place / "program.py").write_text(PROGRAM)
    given = ["run.dir='a b'", 'x="$HOME"', "y=*; echo no"]
    job, out = submit(cluster, place, *TWO_NODES, *sbatch, *given, SPARSETRON_TRAIN=str(place / "program.py"))
    assert cluster.until(job, "COMPLETED", "FAILED") == "COMPLETED", out.read_text()
    ranks = [json.loads((place / f"rank{rank}").read_text()) for rank in range(4)]
    assert [(r["RANK"], r["LOCAL_RANK"], r["SLURM_NODEID"]) for r in ranks] == [
        ("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1"), ("3", "1", "1"),
    ]  # fmt: skip
    assert {(r["WORLD_SIZE"], r["LOCAL_WORLD_SIZE"], r["MASTER_ADDR"]) for r in ranks} == {("4", "2", "127.0.0.1")}
    assert all(r["given"] == given for r in ranks)
    assert {r["cpus"] for r in ranks} == {os.cpu_count()}
