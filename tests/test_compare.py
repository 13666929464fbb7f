"""Comparing runs: the right numbers, honest words, half-written files."""

import json

import pytest
import yaml

from launch import compare


def make_run(path, kind: str, rate: float, device: str = "cpu", seed: int = 0, saving: float = 2.0) -> str:
    path.mkdir()
    config = {
        "attention": {"kind": kind}, "data": {"seq_len": 1024}, "train": {"global_batch": 4, "precision": "fp32"},
        "model": {"dim": 64}, "optim": {"lr": 1e-3}, "seed": seed,
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "environment.json").write_text(json.dumps({"device": device, "world": 1, "data_fingerprint": "f"}))
    lines = []
    for step in range(1, 21):
        speed = rate / 10 if step <= 10 else rate  # a slow start that the median must not see
        shared = {"step_s": 4096 / speed, "tokens_per_s": speed, "model_tflops": 1.0, "mfu": None, "mem_gib": 0.5}
        lines.append({"step": step, "tokens": step * 4096, "loss": 9 - step / 10, "flop_saving": saving, **shared})
    lines.append({"step": 20, "tokens": 20 * 4096, "val_loss": 7.25})
    (path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
    return str(path)


def test_table_ratios_and_picture(tmp_path, capsys):
    nsa = make_run(tmp_path / "nsa-run", "nsa", 3000.0)
    full = make_run(tmp_path / "full-run", "full", 2000.0)
    picture = tmp_path / "deep" / "curves.png"
    assert compare.main([nsa, full, "--output", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "nsa-run against full-run at 1024 tokens of context: 1.50x its tokens/s, measured on 1 x cpu" in out
    assert "2.00x fewer model FLOPs" in out
    assert "7.2500" in out
    assert "3,000" in out
    assert "warning" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_unlike_runs_are_said_to_be(tmp_path, capsys):
    nsa = make_run(tmp_path / "a", "nsa", 3000.0, device="H200", seed=1)
    full = make_run(tmp_path / "b", "full", 2000.0, device="H100")
    assert compare.main([nsa, full, "--output", str(tmp_path / "c.png")]) == 0
    out = capsys.readouterr().out
    assert "not like with like: device differs" in out
    assert "not like with like: seed differs" in out
    assert "(baseline measured on 1 x H100)" in out


def test_without_a_baseline_there_is_no_speed_up(tmp_path, capsys):
    assert compare.main([make_run(tmp_path / "a", "nsa", 3.0), "--output", str(tmp_path / "c.png")]) == 0
    assert "no full-attention run" in capsys.readouterr().out


def test_a_resumed_run_counts_each_step_once_and_a_half_line_not_at_all(tmp_path):
    path = tmp_path / "a"
    make_run(path, "nsa", 3000.0)
    with open(path / "metrics.jsonl", "a") as f:
        f.write(json.dumps({"step": 20, "tokens": 20 * 4096, "loss": 1.5, "mem_gib": 1}) + '\n{"step": 21, "lo')
    run = compare.read(str(path))
    assert len(run.steps) == 20
    assert run.steps[-1]["loss"] == 1.5


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl", "all", "steps"])
def test_what_is_no_run_is_one_line(tmp_path, capsys, missing):
    path = tmp_path / "a"
    if missing != "all":
        make_run(path, "nsa", 3000.0)
        if missing == "steps":
            (path / "metrics.jsonl").write_text("")
        else:
            (path / missing).unlink()
    assert compare.main([str(path), "--output", str(tmp_path / "c.png")]) == 66
    error = capsys.readouterr().err
    assert error.startswith("error: run ")
    assert error.count("\n") == 1
    assert not (tmp_path / "c.png").exists()
