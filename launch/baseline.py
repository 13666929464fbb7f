"""How fast full attention is: what the speed-up of a sparse run is measured against, with the words that say where.

Best is a full-attention twin that was trained: run.twin, or a run beside this one that differs in its attention only.
Before there is one, `run.calibrate` steps of full attention in this process, before the run begins.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from configs.errors import CheckpointError, ConfigError
from configs.schema import Config, Kind
from data.loader import Loader
from data.synthetic import RandomRows
from launch import runs
from launch.runs import Measured
from parallel import metrics
from parallel.comm import host_gather, together
from parallel.engine import Engine
from parallel.mesh import Mesh

SAME = ("model", "parallel", "data", "optim", "train", "seed", "deterministic")  # in a run and its twin
WARM_UP = 3  # steps of a calibration that compile and allocate, or half of them if there are few


@dataclass(frozen=True)
class Baseline:
    """Tokens/s of full attention on all devices together; None where nobody has measured them."""

    tokens_per_s: Optional[float] = None
    source: Optional[str] = None  # what was measured, and where
    record: Optional[dict[str, Any]] = None  # of a calibration, for restarts

    def keep(self, directory: Path) -> None:
        """Write a calibration down in the run's directory."""
        if self.record:
            (directory / "calibration.json").write_text(json.dumps(self.record, indent=1))


def find(
    cfg: Config, text: str, here: dict[str, Any], mesh: Mesh, vocab: int, rows: Callable[[], Loader | RandomRows]
) -> Baseline:
    """The best one for the run of this configuration, as an object and as YAML, in the environment `here`.

    `rows` opens a loader that stands at the first row. Collective. Raises ConfigError for a run.twin that is none.
    """
    if cfg.run.twin:
        return together(lambda: of_twin(cfg.run.twin, text, here), mesh)
    if cfg.attention.kind is Kind.full:
        return Baseline()
    found = beside(cfg, text, here) if mesh.rank == 0 else None
    found = host_gather(found, mesh)[0]
    if found or not cfg.run.calibrate:
        return found or Baseline()
    return calibrate(cfg, here, mesh, vocab, rows)


def of_twin(path: str, text: str, here: dict[str, Any]) -> Baseline:
    """A full-attention run of the model and context of a configuration (YAML) in the environment `here`; its words say
    where it differs in what else has to do with speed. Raises ConfigError for any other run.
    """
    key, fix = f"run.twin={path}", "train it first (twin=full), or give run.twin=null"
    try:
        twin = runs.read(Path(path))
    except CheckpointError as e:
        raise ConfigError("config", key, f"no measured twin there ({e.args[2]})", fix) from e
    config = yaml.safe_load(text)
    unlike = runs.differences([_shape(config), _shape(twin.config)])
    if unlike or not twin.is_full:
        why = f"of another {', '.join(unlike)}" if unlike else "a run of sparse attention"
        raise ConfigError("config", key, f"{why}: no baseline of this run", fix)
    found = runs.differences([runs.pace(config, here), runs.pace(twin.config, twin.environment)])
    words = ", ".join(f"{name} {theirs} (here {ours})" for name, (ours, theirs) in found.items())
    baseline = _trained(twin, path)
    return replace(baseline, source=f"{baseline.source}, unlike this run in {words}") if words else baseline


def _shape(config: dict[str, Any]) -> dict[str, Any]:
    return {"model": {**config["model"], "name": ""}, "data.seq_len": config["data"]["seq_len"]}


def _trained(twin: Measured, path: str) -> Baseline:
    return Baseline(twin.settled("tokens_per_s"), f"{path} on {twin.place}")


def beside(cfg: Config, text: str, here: dict[str, Any]) -> Optional[Baseline]:
    """The twin of a run among the directories beside its own, if there is one."""
    config, place = yaml.safe_load(text), Path(cfg.run.dir)
    for path in sorted(place.parent.glob("*/config.yaml")) if place.parent.is_dir() else []:
        try:
            if f"kind: {Kind.full.value}" not in path.read_text():
                continue
            run = runs.read(path.parent)
        except (CheckpointError, OSError):  # not begun, or not ours
            continue
        same = all(run.config[key] == config[key] for key in SAME)
        where = all(run.environment.get(key) == here[key] for key in ("device", "world", "data_fingerprint"))
        if run.is_full and same and where:
            return _trained(run, str(path.parent))
    return None


def calibrate(
    cfg: Config, here: dict[str, Any], mesh: Mesh, vocab: int, rows: Callable[[], Loader | RandomRows]
) -> Baseline:
    """Full attention on the run's first rows, in its layout, with weights that are thrown away. A restart in the same
    place takes what was measured before, from calibration.json. Raises ConfigError if it has no room. Collective.
    """
    path = Path(cfg.run.dir, "calibration.json")
    config = {"model": vars(cfg.model), "parallel": {**vars(cfg.parallel), "recompute": cfg.parallel.recompute.value}}
    batch = {key: getattr(cfg.train, key) for key in ("global_batch", "micro_batch")}
    of = {"steps": cfg.run.calibrate, "device": here["device"], "world": here["world"], "torch": here["torch"]}
    of |= {**config, **batch, "seq_len": cfg.data.seq_len, "precision": cfg.train.precision.value}
    of["deterministic"] = cfg.deterministic
    known = json.loads(path.read_text()) if mesh.rank == 0 and path.exists() else {}
    known = host_gather(known, mesh)[0]
    if known.get("of") != of:
        begin = time.perf_counter()
        loader = together(rows, mesh)
        steps = together(lambda: [loader.next_step() for _ in range(cfg.run.calibrate)], mesh)
        seconds, memory = host_gather(measure(cfg, vocab, mesh, steps), mesh)[0]
        took = time.perf_counter() - begin
        known = {"of": of, "step_s": seconds, "mem_gib": memory, "took_s": took}
    warm = min(WARM_UP, cfg.run.calibrate // 2)
    settled = known["step_s"][warm:]
    speed = cfg.train.global_batch * cfg.data.seq_len / statistics.median(settled)
    source = f"calibration, no trained twin: median of {len(settled)} full-attention steps before the run, "
    source += f"{min(settled):.3g} to {max(settled):.3g} s each, after {warm} of warm-up, "
    source += f"on {here['world']} x {here['device']}; "
    return Baseline(speed, source + f"took {known['took_s']:.1f} s and {known['mem_gib']:.2f} GiB", known)


def measure(cfg: Config, vocab: int, mesh: Mesh, steps: Iterable[list[Any]]) -> tuple[list[float], float]:
    """Seconds of each step of the full-attention twin, and its peak memory in GiB. Nothing of it stays behind: neither
    memory, nor a change to the state of random numbers. Collective."""
    twin = replace(cfg, attention=replace(cfg.attention, kind=Kind.full))
    tokens = cfg.train.global_batch * cfg.data.seq_len
    devices = [mesh.device] if mesh.device.type == "cuda" else []
    metrics.reset_memory(mesh.device)
    try:
        with torch.random.fork_rng(devices=devices):
            engine = Engine(twin, vocab, mesh)
            seconds = [_seconds(engine, batches, tokens) for batches in steps]
            engine.close()
    except torch.OutOfMemoryError as e:
        why, fix = "full attention has no room here", "give run.calibrate=0, or run.twin=DIR of a trained twin"
        raise ConfigError("config", f"run.calibrate={cfg.run.calibrate}", why, fix) from e
    peak = metrics.memory_gib(mesh.device)
    del engine
    gc.collect()
    if devices:
        torch.cuda.empty_cache()
    metrics.reset_memory(mesh.device)
    return seconds, peak


def _seconds(engine: Engine, batches: list[Any], tokens: int) -> float:
    begin = time.perf_counter()
    loss, _ = engine.train_step(batches, tokens, lr=0.0)
    loss.item()  # waits for the device
    return time.perf_counter() - begin
