"""train.py as a user starts it: it learns, stops, continues, and says in one line what is wrong."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from launch import dashboard

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "model.layers=2 model.dim=48 model.heads=4 model.kv_heads=2 model.qk_dim=12 model.v_dim=12 model.mlp_dim=96 "
    "attention.l=8 attention.d=4 attention.l_slc=16 attention.n=4 attention.w=32 data.seq_len=128 "
    "train.global_batch=4 train.micro_batch=2 train.precision=fp32 optim.lr=3e-3 optim.min_lr=3e-4 optim.warmup=2 "
    "wandb.mode=disabled run.calibrate=0"
).split() + ["deterministic=true"] * torch.cuda.is_available()  # runs are compared bit for bit


def command(corpus: str, run: Path, *overrides: str, processes: int = 1) -> list[str]:
    options = [*SMALL, f"data.path={corpus}", f"run.dir={run}", *overrides]
    if processes == 1:
        return [sys.executable, str(ROOT / "train.py"), *options]
    return [str(ROOT / "launch/local.sh"), "-n", str(processes), *options]


def train(corpus, run, *overrides: str, processes: int = 1, code: int = 0, env=None) -> subprocess.CompletedProcess:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **(env or {})}
    started = command(corpus, run, *overrides, processes=processes)
    done = subprocess.run(started, capture_output=True, text=True, timeout=240, env=env, cwd=run.parent, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def lines(run: Path, key: str = "loss") -> dict[int, dict]:
    return {m["step"]: m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in m}


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """A run of eight steps that evaluates at 4 and 8 and saves at 4 and 8."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(
        corpus,
        run,
        "train.steps=8",
        "train.health_every=3",
        "profile.steps=[2,3]",
        "checkpoint.every=4",
        "train.eval_every=4",
        "train.eval_batches=2",
    )
    return run


def test_a_run_leaves_what_it_promises(whole):
    steps = lines(whole)
    assert list(steps) == list(range(1, 9))
    assert steps[8]["loss"] < steps[1]["loss"] - 0.15
    promised = "step tokens loss grad_norm lr step_s tokens_per_s tokens_per_s_per_gpu model_tflops mfu mem_gib"
    assert all(set(promised.split()) <= set(m) for m in steps.values())
    parts = {key: value for key, value in steps[8].items() if key.startswith("time/")}
    assert {"time/forward_s", "time/backward_s", "time/optimizer_s", "time/reduce_gradients_s"} <= set(parts)
    assert 0.5 * steps[8]["step_s"] < sum(parts.values()) < steps[8]["step_s"]
    assert 0 < steps[8]["data_wait_s"] < steps[8]["step_s"]
    assert steps[8]["tokens"] == 8 * 4 * 128
    assert steps[8]["mfu"] is None, "a CPU has no known peak"
    assert set(lines(whole, "val_loss")) == {4, 8}
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["steps"] == 8
    assert json.loads((whole / "exit.json").read_text()) | {"goodput": 0} == {"code": 0, "reason": "done", "goodput": 0}
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["world"] == 1
    assert environment["torch"].startswith("2.")


def test_the_dashboard_shows_what_is_logged(whole):
    logged = {key for line in (whole / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    shown = {name for panels in dashboard.CURVES.values() for names in panels.values() for name in names}
    assert shown <= logged
    assert set(dashboard.BY_CONTEXT.values()) <= shown
    for begin in [begin for panels in dashboard.FAMILIES.values() for begin in panels.values()]:
        assert any(key.startswith(begin) for key in logged), begin


def test_the_health_of_sparsity_is_logged_when_it_is_due(whole):
    key = "sparsity/gate_win/layer_01"
    assert list(lines(whole, key)) == [3, 6]
    assert 0 < lines(whole, key)[6][key] < 1


def test_a_trace_of_the_steps_asked_for(whole):
    events = json.loads((whole / "traces" / "steps-2-3-rank-00000.json").read_text())["traceEvents"]
    assert any(e.get("name", "").startswith("Optimizer.step") for e in events)


def test_the_validation_loss_is_of_documents_that_are_not_trained_on(whole):
    first, last = lines(whole, "val_loss")[4], lines(whole, "val_loss")[8]
    assert last["val_loss"] < first["val_loss"]


def test_a_finished_run_started_again_is_done_at_once(whole, corpus):
    before = (whole / "metrics.jsonl").read_text()
    train(corpus, whole, "train.steps=8")
    assert (whole / "metrics.jsonl").read_text() == before


def test_more_steps_continue_it(corpus, tmp_path, whole):
    run = tmp_path / "run"
    # the same schedule: the rate depends on the number of steps, so it ends early instead
    started = subprocess.Popen(
        command(corpus, run, "train.steps=400", "checkpoint.every=2"), stdout=subprocess.PIPE, text=True
    )
    for line in started.stdout:
        if line.startswith("step      5/"):
            started.send_signal(signal.SIGTERM)
            break
    started.stdout.read()
    assert started.wait(60) == 75
    assert json.loads((run / "exit.json").read_text())["code"] == 75
    stopped = max(lines(run))
    assert (run / "checkpoints" / f"step-{stopped:08d}").exists()
    (run / "STOP").touch()
    train(corpus, run, "train.steps=400", "checkpoint.every=2")
    assert json.loads((run / "exit.json").read_text())["reason"] == "stopped by the user"
    assert max(lines(run)) == stopped + 1
    unbroken = tmp_path / "unbroken"
    once = subprocess.Popen(command(corpus, unbroken, "train.steps=400"), stdout=subprocess.PIPE, text=True)
    for line in once.stdout:
        if line.startswith(f"step {stopped + 1:>6}/"):
            once.send_signal(signal.SIGTERM)
            break
    once.stdout.read()
    once.wait(60)
    for step, m in lines(run).items():
        expected = lines(unbroken)[step]
        assert {k: m[k] for k in ("loss", "grad_norm", "lr", "tokens")} == {
            k: expected[k] for k in ("loss", "grad_norm", "lr", "tokens")
        }, step


def test_four_processes_train_like_one(corpus, tmp_path, whole):
    run = tmp_path / "run with a space"
    layout = ["parallel.tp=2", "parallel.pp=2", "parallel.sequence=true", "parallel.recompute=full"]
    train(corpus, run, "train.steps=8", "train.eval_every=4", "train.eval_batches=2", *layout, processes=4)
    for key in ("loss", "grad_norm"):
        ours, theirs = ([m[key] for m in lines(r).values()] for r in (run, whole))
        assert ours == pytest.approx(theirs, rel=1e-5)
    ours, theirs = ([m["val_loss"] for m in lines(r, "val_loss").values()] for r in (run, whole))
    assert ours == pytest.approx(theirs, rel=1e-5)
    flops = [lines(r)[8]["model_tflops"] * lines(r)[8]["step_s"] * n for r, n in ((run, 4), (whole, 1))]
    assert flops[0] == pytest.approx(flops[1], rel=0.01), "each layout counts the same work"
    assert 0 < lines(run)[8]["time/stages_s"] < lines(run)[8]["step_s"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [run.name], "one run directory, nothing beside it"


def test_a_run_goes_on_in_another_layout(corpus, tmp_path, whole):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    layout = ["parallel.tp=2", "parallel.pp=2", "parallel.sequence=true"]
    train(corpus, run, "train.steps=8", *layout, processes=4)
    for step in range(5, 9):
        for key in ("loss", "grad_norm"):
            assert lines(run)[step][key] == pytest.approx(lines(whole)[step][key], rel=1e-5)
    assert lines(run)[5]["loss"] == pytest.approx(lines(whole)[5]["loss"], rel=1e-6)


def test_the_full_attention_twin_reads_the_same_batches_and_is_the_baseline(corpus, tmp_path, whole):
    twin = tmp_path / "full"
    train(corpus, twin, "train.steps=3", "attention=full")
    assert json.loads((twin / "environment.json").read_text())["data_fingerprint"]
    nsa = tmp_path / "nsa"
    train(corpus, nsa, "train.steps=2", f"run.twin={twin}")
    m = lines(nsa)[2]
    assert m["speedup_vs_full"] == pytest.approx(m["saving_realised"] * m["flop_saving"])
    assert str(twin) in m["speedup_from"]


BAD = [  # overrides, exit code, what the line says
    (["train.stepz=3"], 64, ["stepz"]),
    (["model=nope"], 64, ["model/nope"]),
    (["attention.w=zero"], 64, ["attention.w", "zero"]),
    (["model.heads=3"], 64, ["model.heads=3", "model.kv_heads=2"]),
    (["attention.backend=triton"], 64, ["attention.backend=triton"]),
    (["data.path=absent"], 65, ["absent", "python -m data.prepare"]),
    (["model.vocab_size=100"], 64, ["model.vocab_size=100"]),
    (["resume=must"], 66, ["resume=must"]),
    (["run.twin=absent"], 64, ["run.twin=absent"]),
]


@pytest.mark.parametrize(("overrides", "code", "says"), BAD, ids=str)
def test_bad_input_is_one_line_a_code_and_no_run_directory(corpus, tmp_path, overrides, code, says):
    run = tmp_path / "run"
    (line,) = errors(train(corpus, run, *overrides, code=code))
    for part in says:
        assert part in line
    assert list(tmp_path.iterdir()) == []


def test_bad_input_on_several_processes_is_still_one_line_and_its_code(corpus, tmp_path):
    for overrides, code in ((["parallel.tp=3"], 64), (["data.path=absent"], 65)):
        done = train(corpus, tmp_path / "run", *overrides, processes=2, code=code)
        assert len(errors(done)) == 1
        assert "Traceback" not in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_touched_under_resume_never(corpus, whole):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    (line,) = errors(train(corpus, whole, "resume=never", code=66))
    assert "resume=never" in line
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_refused(corpus, whole):
    (line,) = errors(train(corpus, whole, "model.mlp_dim=64", "train.steps=9", code=66))
    assert "model.mlp_dim=96, this run has 64" in line
    (line,) = errors(train(corpus, whole, "attention=full", "train.steps=9", code=66))
    assert "attention.kind=nsa, this run has full" in line


def test_a_shard_cut_short_ends_the_run_with_its_name(corpus, tmp_path):
    data = Path(shutil.copytree(corpus, tmp_path / "data"))
    for shard in sorted(data.glob("train-*.tar"))[1:]:
        shard.write_bytes(shard.read_bytes()[:-512])
    done = train(str(data), tmp_path / "run", "train.steps=500", "train.log_every=50", processes=2, code=65)
    (line,) = errors(done)
    assert "bytes instead of" in line
    assert str(data) in line
    assert "step " not in done.stdout, "it is known before the first step"
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run(corpus, tmp_path):
    run = tmp_path / "run"
    (line,) = errors(
        train(corpus, run, "train.steps=50", "optim.lr=1e30", "optim.warmup=0", "optim.clip=1e30", code=76)
    )
    assert "nan" in line
    assert json.loads((run / "exit.json").read_text())["code"] == 76
    assert list(lines(run)) == [1], "the only step with a loss"
    skipped = list(lines(run, "update_skipped").values())
    assert [m["updates_skipped"] for m in skipped] == [1, 2, 3]
    bundle = run / "diverged" / "step-00000004.json"
    assert str(bundle) in line
    seen = json.loads(bundle.read_text())
    assert seen["rows"] == {"first": 12, "end": 16}
    assert seen["loss"] == "nan"
    assert all(n["gradient"] == "nan" for n in seen["parameters"].values())
    assert all(n["weight"] > 1e20 for n in seen["parameters"].values())


def test_wandb_offline_keeps_its_run_and_no_wandb_keeps_the_run(corpus, tmp_path):
    run = tmp_path / "run"
    train(corpus, run, "train.steps=2", "wandb.mode=offline")
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    other = tmp_path / "other"
    broken = tmp_path / "broken" / "wandb"  # a wandb that cannot be imported
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('no wandb here')")
    done = train(corpus, other, "train.steps=2", "wandb.mode=offline", env={"PYTHONPATH": str(broken.parent)})
    assert "W&B is off: no wandb here" in done.stderr
    assert max(lines(other)) == 2


def test_ctrl_c_ends_it_with_a_checkpoint_and_code_zero(corpus, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(command(corpus, run, "train.steps=500"), stdout=subprocess.PIPE, text=True)
    for line in itertools.islice(process.stdout, 4):
        assert line
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait(60) == 0
    assert list((run / "checkpoints").iterdir())


def test_progress_is_printed_all_the_while(corpus, tmp_path):
    process = subprocess.Popen(
        command(corpus, tmp_path / "run", "train.steps=4"), stdout=subprocess.PIPE, text=True, env=os.environ
    )
    seen = [(time.monotonic(), line) for line in process.stdout if line.startswith("step ")]
    assert process.wait(60) == 0
    assert len(seen) == 5
    assert seen[-1][0] > seen[0][0]


def test_a_run_on_random_tokens_needs_no_data_and_saves_if_asked(tmp_path):
    run, options = tmp_path / "run", [o for o in SMALL if "data" not in o]
    start = [sys.executable, str(ROOT / "train.py"), *options, f"run.dir={run}", "data.random=500", "data.seq_len=128"]
    for more, code in [(["train.steps=2", "checkpoint.last=false"], 0), (["train.steps=4"], 0), (["seed=1"], 65)]:
        done = subprocess.run([*start, *more], capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False)
        assert done.returncode == code, done.stdout + done.stderr
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [m["step"] for m in logged if "loss" in m]
    assert steps == [1, 2, 1, 2, 3, 4], "the first run saved nothing to continue"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000004"]
    assert "data.random" in errors(done)[0]
