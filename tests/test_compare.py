"""Comparing runs: the right numbers, honest words, half-written files."""

import json
from pathlib import Path

import pytest
import yaml

from configs.errors import CheckpointError
from launch import compare
from launch.runs import read


def make_run(
    path: Path, kind: str, rate: float, device: str = "cpu", seed: int = 0, context: int = 1024, health: bool = False
) -> str:
    """A run directory of twenty steps. Returns its path."""
    path.mkdir(parents=True)
    config = {
        "attention": {"kind": kind}, "data": {"seq_len": context}, "train": {"global_batch": 4, "precision": "fp32"},
        "model": {"dim": 64}, "optim": {"lr": 1e-3}, "seed": seed,
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "environment.json").write_text(json.dumps({"device": device, "world": 1, "data_fingerprint": "f"}))
    lines = []
    for step in range(1, 21):
        speed = rate / 10 if step <= 10 else rate  # a slow start that the median must not see
        shared = {"step_s": 4096 / speed, "tokens_per_s": speed, "model_tflops": 1.0, "mfu": None, "mem_gib": 0.5}
        lines.append({"step": step, "tokens": step * 4096, "loss": 9 - step / 10, "flop_saving": 2.0, **shared})
    lines.append(
        {"step": 20, "tokens": 20 * 4096, "val_loss": 7.25, "val_loss_from/000000": 8.0, "val_loss_from/000512": 6.5}
    )
    if health:
        layers = {f"sparsity/gate_cmp/layer_{i:02}": 0.25 * (i + 1) for i in range(2)}
        lines += [{"step": step, "tokens": step * 4096, **layers} for step in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    return str(path)


def test_table_ratios_and_report(tmp_path, capsys):
    nsa = make_run(tmp_path / "nsa-run", "nsa", 3000.0)
    full = make_run(tmp_path / "full-run", "full", 2000.0)
    report = tmp_path / "deep" / "report.html"
    assert compare.main([nsa, full, "--output", str(report)]) == 0
    out = capsys.readouterr().out
    said = "nsa-run against full-run at 1024 tokens of context: 1.50x its tokens/s "
    said += "(medians of 10 and 10 logged steps), measured on 1 x cpu"
    assert said in out
    assert said in report.read_text()
    assert "full attention needs 2.00x its model FLOPs by formula" in out
    assert "7.2500" in out
    assert "3,000" in out
    assert "warning" not in out


def test_runs_of_one_name_are_told_apart_and_none_is_there_twice(tmp_path, capsys):
    for sweep, rate in (("one", 3000.0), ("two", 1000.0)):
        make_run(tmp_path / sweep / "n-8", "nsa", rate)
    make_run(tmp_path / "full", "full", 2000.0)
    given = [tmp_path / "one", tmp_path / "two", tmp_path / "full", tmp_path / "full"]
    assert compare.main([*map(str, given), "--output", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/one/n-8 against full at 1024 tokens of context: 1.50x" in out
    assert f"{tmp_path}/two/n-8 against full at 1024 tokens of context: 0.50x" in out
    runs = compare.named([Path(path) for path in (tmp_path / "one" / "n-8", tmp_path / "full")])
    assert [run.name for run in runs] == ["n-8", "full"]
    assert len([line for line in out.splitlines() if line.startswith("│ full ")]) == 1


@pytest.mark.parametrize(("part", "key"), [("train", "micro_batch"), ("parallel", "recompute"), ("model", "init_std")])
def test_what_has_to_be_alike_is_named(tmp_path, part, key):
    runs = [read(Path(make_run(tmp_path / kind, kind, 9.0))) for kind in ("nsa", "full")]
    assert compare.warnings(runs) == []
    runs[0].config[part][key] = 7
    assert compare.warnings(runs) == [
        f"warning: nsa and full are not like with like: {part}.{key} differs (7, {runs[1].config[part][key]})",
    ]


def test_bits_that_repeat_cost_speed(tmp_path):
    runs = [read(Path(make_run(tmp_path / kind, kind, 9.0))) for kind in ("nsa", "full")]
    runs[1].config["deterministic"] = True
    assert compare.warnings(runs) == [
        "warning: nsa and full are not like with like: deterministic differs (False, True)",
    ]


def test_another_triton_is_another_speed(tmp_path):
    runs = [read(Path(make_run(tmp_path / kind, kind, 9.0))) for kind in ("nsa", "full")]
    runs[1].environment["triton"] = "3.7.1"
    assert compare.warnings(runs) == [
        "warning: nsa and full are not like with like: triton differs (None, 3.7.1)",
    ]


def test_unlike_runs_are_said_to_be(tmp_path, capsys):
    nsa = make_run(tmp_path / "a", "nsa", 3000.0, device="H200", seed=1)
    full = make_run(tmp_path / "b", "full", 2000.0, device="H100")
    assert compare.main([nsa, full, "--output", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "a and b are not like with like: device differs (H200, H100); seed differs (1, 0)" in out
    assert "(baseline measured on 1 x H100)" in out


def test_the_baseline_is_the_full_run_most_alike_at_the_same_context(tmp_path):
    def run(name, *args, **options):
        return read(Path(make_run(tmp_path / name, *args, **options)))

    nsa = run("nsa", "nsa", 9.0, seed=1)
    longer = run("longer", "full", 1.0, seed=1, context=2048)
    other, same = run("other", "full", 2.0, seed=0), run("same", "full", 3.0, seed=1)
    assert compare.baseline(nsa, [longer, other, nsa, same]) is same
    assert compare.baseline(nsa, [nsa, other, longer]) is other
    assert compare.baseline(nsa, [nsa, longer]) is None
    assert compare.baseline(same, [same, other]) is None
    own = run("nsa-full", "full", 3.0, seed=1)
    assert compare.baseline(nsa, [same, nsa, own]) is own, "of two that are alike the one of its name"


def test_without_a_baseline_there_is_no_speed_up(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", "nsa", 3.0), make_run(tmp_path / "b", "full", 3.0, context=4096)]
    assert compare.main([*runs, "--output", str(tmp_path / "c.html")]) == 0
    assert "a: no full-attention run at 1024 tokens of context among these" in capsys.readouterr().out
    assert "Speed-up" not in (tmp_path / "c.html").read_text()


def test_the_speed_up_of_a_runs_own_log_is_said_with_what_it_is_against(tmp_path, capsys):
    path = Path(make_run(tmp_path / "a", "nsa", 3.0))
    own = {"speedup_vs_full": 1.25, "speedup_from": "calibration, no trained twin"}
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (path / "metrics.jsonl").write_text("".join(json.dumps({**m, **own}) + "\n" for m in logged))
    assert compare.main([str(path), "--output", str(tmp_path / "c.html")]) == 0
    said = "so no speed-up; 1.25x by its own log, against calibration, no trained twin"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "c.html").read_text()


def test_sparsity_and_changed_options_are_on_the_terminal(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", "nsa", 3.0, health=True), make_run(tmp_path / "b", "full", 3.0, context=2048)]
    assert compare.main([*runs, "--output", str(tmp_path / "c.html")]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["a", "0.375"] in rows, "gate_cmp of the two layers"
    assert ["attention.kind", "nsa", "full"] in rows
    assert ["data.seq_len", "1024", "2048"] in rows
    assert compare.main([runs[1], "--output", str(tmp_path / "c.html")]) == 0
    out = capsys.readouterr().out
    assert "sparsity at the last" not in out
    assert "where they differ" not in out


def test_a_folder_of_runs_is_its_runs(tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for name, kind in (("one", "nsa"), ("two", "full")):
        make_run(sweep / name, kind, 3000.0)
    assert compare.main([str(sweep), "--output", str(tmp_path / "c.html")]) == 0
    assert "one against two" in capsys.readouterr().out


def test_only_html_is_written(tmp_path, capsys):
    assert compare.main([make_run(tmp_path / "a", "nsa", 3.0), "--output", str(tmp_path / "c.png")]) == 64
    assert "error: option --output" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl", "all", "steps"])
def test_what_is_no_run_is_one_line(tmp_path, capsys, missing):
    path = tmp_path / "a"
    if missing != "all":
        make_run(path, "nsa", 3000.0)
        if missing == "steps":
            (path / "metrics.jsonl").write_text("")
        else:
            (path / missing).unlink()
    assert compare.main([str(path), "--output", str(tmp_path / "c.html")]) == 66
    error = capsys.readouterr().err
    assert error.startswith("error: run ")
    assert error.count("\n") == 1
    assert not (tmp_path / "c.html").exists()


def test_only_runs_that_are_done_are_compared(tmp_path, capsys):
    ends = {"done": (0, "done"), "diverged": (76, "no number"), "killed": None}
    for name, end in ends.items():
        (tmp_path / name).mkdir()
        if end:
            (tmp_path / name / "exit.json").write_text(json.dumps({"code": end[0], "reason": end[1]}))
    assert compare.finished([str(tmp_path / name) for name in ends]) == [str(tmp_path / "done")]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"left out: {tmp_path}/diverged: no number", f"left out: {tmp_path}/killed: it has not ended"]
    with pytest.raises(CheckpointError, match="nor is another"):
        compare.finished([str(tmp_path / "killed")])
