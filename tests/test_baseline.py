"""The baseline of the speed-up: a calibration leaves no trace, says what it is, and yields to a real twin."""

import gc
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensor

from configs.errors import ConfigError
from data.loader import Loader
from launch import baseline, runs
from parallel import mesh, metrics
from tests import ranks, tiny
from tests.test_compare import make_run
from tests.test_parity import VOCAB, train
from tests.test_train import lines
from tests.test_train import train as run_train


def held() -> int:
    """Bytes in tensors that are alive."""
    gc.collect()
    alive = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and not isinstance(x, FakeTensor)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())


def calibrated(cfg) -> tuple[list, int, int, list[float]]:
    """Losses and norms of a run after a calibration; bytes held before and after that, and its step times."""
    place = mesh.build(cfg.parallel.tp, cfg.parallel.pp)
    rows = (cfg.data.seq_len, cfg.train.global_batch, cfg.train.micro_batch, cfg.seed)
    loader = Loader(cfg.data.path, "train", *rows, place.dp.rank, place.dp.size)
    steps = [loader.next_step() for _ in range(3)]
    before, state = held(), torch.get_rng_state()
    seconds, peak = baseline.measure(cfg, VOCAB, place, steps)
    after = held()
    assert torch.equal(torch.get_rng_state(), state)
    assert peak > 0
    return train(cfg, 3), before, after, seconds


LAYOUTS = [(1, {}), (2, {"pp": 2}), (2, {"zero": 3})]


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_a_calibration_changes_nothing_and_leaves_nothing(corpus, world, layout):
    cfg = tiny.config(data__path=corpus, **{f"parallel__{k}": v for k, v in layout.items()})
    plain = ranks.run(world, train, cfg, 3)
    for expected, (out, before, after, seconds) in zip(plain, ranks.run(world, calibrated, cfg)):
        assert out == expected, "bit-identical"
        assert len(seconds) == 3
        assert after <= before + 10_000, "bytes; the model alone has 1.3 million"


def test_it_is_logged_with_what_it_is_and_measured_once(corpus, tmp_path):
    plain, run = tmp_path / "plain", tmp_path / "run"
    run_train(corpus, plain, "train.steps=4", "checkpoint.every=2")
    done = run_train(corpus, run, "train.steps=3", "checkpoint.every=3", "run.calibrate=8")
    for step, m in lines(run).items():
        assert (m["loss"], m["grad_norm"]) == (lines(plain)[step]["loss"], lines(plain)[step]["grad_norm"])
        found = re.match(
            r"calibration, no trained twin: median of 5 full-attention steps before the run, "
            r"([\d.]+) to ([\d.]+) s each, after 3 of warm-up, on 1 x ",
            m["speedup_from"],
        )
        assert m["speedup_vs_full"] == pytest.approx(m["saving_realised"] * m["flop_saving"])
    assert "full (calibrated)" in done.stdout
    assert m["speedup_from"] in done.stdout
    known = json.loads((run / "calibration.json").read_text())
    assert len(known["step_s"]) == 8
    timed = known["step_s"][3:]
    assert [float(x) for x in found.groups()] == pytest.approx([min(timed), max(timed)], rel=0.01)
    full = 4 * 128 / statistics.median(timed)  # tokens/s
    assert m["speedup_vs_full"] == pytest.approx(m["tokens_per_s"] / full)
    run_train(corpus, run, "train.steps=4", "run.calibrate=8")
    assert json.loads((run / "calibration.json").read_text()) == known, "a restart does not measure again"
    assert lines(plain)[4]["speedup_vs_full"] is None


def test_a_twin_beside_the_run_is_found(corpus, tmp_path):
    run_train(corpus, tmp_path / "a-full", "train.steps=2", "attention=full")
    run_train(corpus, tmp_path / "a", "train.steps=2", "run.calibrate=2")
    assert lines(tmp_path / "a")[2]["speedup_from"].startswith(f"{tmp_path / 'a-full'} on 1 x ")
    assert not (tmp_path / "a" / "calibration.json").exists()


def test_only_a_run_that_differs_in_nothing_else_is_a_twin(tmp_path):
    make_run(tmp_path / "twin", "full", 2000.0)
    cfg = tiny.config(run__dir=str(tmp_path / "run"))
    config = runs.read(tmp_path / "twin").config
    here = {"device": "cpu", "world": 1, "data_fingerprint": "f"}
    found = baseline.beside(cfg, yaml.safe_dump(config), here)
    assert found == baseline.Baseline(2000.0, f"{tmp_path / 'twin'} on 1 x cpu")
    for key in baseline.SAME:
        assert baseline.beside(cfg, yaml.safe_dump({**config, key: {"changed": 1}}), here) is None, key
    for key in here:
        assert baseline.beside(cfg, yaml.safe_dump(config), {**here, key: "other"}) is None, key


def test_run_twin_takes_only_full_attention_of_the_same_model_and_says_what_else_differs(tmp_path):
    place = {kind: Path(make_run(tmp_path / kind, kind, 2000.0)) for kind in ("full", "nsa")}
    config = runs.read(place["full"]).config
    here = {"device": "cpu", "world": 1, "data_fingerprint": "f"}

    def source(twin: str, here=here, **changes) -> str:
        return baseline.of_twin(str(tmp_path / twin), yaml.safe_dump({**config, **changes}), here).source

    assert source("full") == source("full", optim={"lr": 1.0}, seed=5) == f"{place['full']} on 1 x cpu"
    words = source("full", here={**here, "world": 2}, parallel={**config["parallel"], "tp": 2})
    assert words == f"{place['full']} on 1 x cpu, unlike this run in processes 1 (here 2), parallel.tp 1 (here 2)"
    assert source("full", deterministic=True).endswith("unlike this run in deterministic False (here True)")
    other = {"data": {"seq_len": 2048}, "model": {**config["model"], "dim": 32}}
    refused = {
        "absent": ({}, "no measured twin there"),
        "nsa": ({}, "a run of sparse attention"),
        "full": (other, "of another model.dim, data.seq_len"),
    }
    for twin, (changes, why) in refused.items():
        with pytest.raises(ConfigError, match=rf"run\.twin=.*{twin}: {why}.*twin=full"):
            source(twin, **changes)


def test_the_peak_of_memory_begins_anew():
    block = torch.ones(60_000_000)
    high = metrics.memory_gib(torch.device("cpu"))
    del block
    metrics.reset_memory(torch.device("cpu"))
    assert metrics.memory_gib(torch.device("cpu")) < high - 0.15, f"of {high} GiB"
    assert Path("/proc/self/clear_refs").exists()
