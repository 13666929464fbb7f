"""What a run writes down, on rank 0: metrics.jsonl (the truth), lines on the terminal, the W&B run that mirrors them.

W&B can be slow, down or absent: each call to it is guarded, and the first failure turns it off with one line.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import yaml

from configs.schema import Config, WandbMode
from data import batches
from data.loader import Loader


class RunLog:
    """Open for the length of a run."""

    def __init__(self, cfg: Config, config_text: str, environment: dict[str, Any], wandb_id: str):
        self.steps = cfg.train.steps
        self.directory = Path(cfg.run.dir)
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(config_text)
        (self.directory / "exit.json").unlink(missing_ok=True)  # of the process before
        (self.directory / "environment.json").write_text(json.dumps(environment, indent=1))
        self.file = open(self.directory / "metrics.jsonl", "a", buffering=1)  # noqa: SIM115  closed by close()
        self.wandb = _Wandb(cfg, yaml.safe_load(config_text), environment, wandb_id)
        self.started, self.first = time.monotonic(), None
        self.batch: Optional[int] = None  # that came last
        self.full = False  # of the disk is known that it takes nothing

    def position(self, step: int, loader: Loader) -> None:
        """Keep where the data stands after `step`, wherever the next batch does not simply follow (data/batches.py)."""
        number, _ = loader.coming
        if self.batch is None or number != self.batch + 1:
            self._try(lambda: batches.append(self.directory, step, loader))
        if number != loader.batch + 1:
            print(f"step {step + 1} passes over batches {loader.batch + 1} to {number - 1}", flush=True)
        self.batch = number

    def step(self, metrics: dict[str, Any]) -> None:
        """One logged step."""
        self._write(metrics)
        if self.first is None:
            self.first = metrics["step"]
            self.started = time.monotonic()
        print(self._line(metrics), flush=True)

    def skipped(self, step: int, tokens: int, why: str, count: int, seen: dict[str, float]) -> None:
        """One step whose update was left out: `seen` is what was wrong, numbers or not."""
        seen = {f"seen_{k}": v for k, v in _json(seen).items()}
        self._write({"step": step, "tokens": tokens, "update_skipped": why, "updates_skipped": count, **seen})
        print(f"step {step:>6}/{self.steps}  update left out, {count} so far: {why}  {seen}", flush=True)

    def bundle(self, path: Path, content: dict[str, Any]) -> None:
        """What there is to see where a run ended badly."""
        self._try(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        self._try(lambda: path.write_text(json.dumps(_json(content), indent=1)))

    def validation(self, metrics: dict[str, Any]) -> None:
        """One evaluation."""
        self._write(metrics)
        print(f"step {metrics['step']:>6}/{self.steps}  validation loss {metrics['val_loss']:.4f}", flush=True)

    def rolled_back(self, tokens: int, entries: list[dict[str, Any]]) -> None:
        """The run went back, for the last of these reasons."""
        last = entries[-1]
        self._write({"tokens": tokens, "rolled_back": len(entries), **last})
        past = "batches {} to {}".format(*last["batches"])
        print(f"step {last['step']}: {last['why']}; back to step {last['to']}, past {past}", flush=True)

    def saved(self, figures: dict[str, Any]) -> None:
        """One save: how long training stood still for it, how long it took behind it; or why it failed."""
        self._write(figures)
        if "save_failed" in figures:
            print(f"warning: no checkpoint of step {figures['step']}: {figures['save_failed']}", flush=True)

    def health(self, metrics: dict[str, Any]) -> None:
        """What sparse attention does; too much for the terminal."""
        self._write(metrics)

    def say(self, line: str) -> None:
        """A line on the terminal only."""
        print(line, flush=True)

    def close(self, code: int, reason: str, goodput: float) -> None:
        """Write exit.json and end the W&B run."""
        self.say(f"ends with code {code}: {reason}; {goodput:.1%} of the time since the first start went into steps")
        end = {"code": code, "reason": reason, "goodput": goodput}
        self._try(self.file.close)
        self._try(lambda: (self.directory / "exit.json").write_text(json.dumps(end)))
        self.wandb.finish(code)

    def _write(self, metrics: dict[str, Any]) -> None:
        self._try(lambda: self.file.write(json.dumps(metrics) + "\n"))
        self.wandb.log(metrics)

    def _try(self, write: Callable[[], Any]) -> None:
        """A full disk ends a run where a checkpoint needs it; lines wait in the file's buffer until there is room."""
        try:
            write()
        except OSError as e:
            if not self.full:
                print(f"warning: {self.directory}: {e}; metrics may be missing", file=sys.stderr, flush=True)
            self.full = True

    def _line(self, m: dict[str, Any]) -> str:
        done = m["step"] - self.first
        left = (time.monotonic() - self.started) / done * (self.steps - m["step"]) if done else None
        parts = [
            f"step {m['step']:>6}/{self.steps}",
            f"loss {m['loss']:.4f}",
            f"norm {m['grad_norm']:.3f}",
            f"lr {m['lr']:.2e}",
            f"{m['tokens_per_s']:,.0f} tokens/s",
            f"{m['model_tflops']:.3g} TFLOP/s",
            "" if m["mfu"] is None else f"MFU {m['mfu']:.1%}",
            "" if m["speedup_vs_full"] is None else f"{m['speedup_vs_full']:.2f}x full",
            f"{m['mem_gib']:.2f} GiB",
            "" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left",
        ]
        return "  ".join(p for p in parts if p)


def _json(value: Any) -> Any:
    """Numbers that JSON has no word for, as text."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class _Wandb:
    """The W&B run, or nothing."""

    def __init__(self, cfg: Config, config: dict[str, Any], environment: dict[str, Any], wandb_id: str):
        self.run: Optional[Any] = None
        if cfg.wandb.mode is WandbMode.disabled:
            return
        try:
            self.run = _start(cfg, config, Path(cfg.run.dir), environment, wandb_id)
        except Exception as e:  # a dashboard never stops a run
            self._off(e)

    def log(self, metrics: dict[str, Any]) -> None:
        if self.run is not None:
            try:
                self.run.log(metrics)  # no step=: after a rollback W&B would drop points; tokens are the axis
            except Exception as e:
                self._off(e)

    def finish(self, code: int) -> None:
        if self.run is not None:
            try:
                self.run.finish(exit_code=code)
            except Exception as e:
                self._off(e)

    def _off(self, error: Exception) -> None:
        self.run = None
        reason = " ".join(str(error).split())[:200]
        print(f"warning: W&B is off: {reason}; metrics.jsonl has the numbers", file=sys.stderr, flush=True)


def _start(cfg: Config, config: dict[str, Any], directory: Path, environment: dict[str, Any], wandb_id: str) -> Any:
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(directory.absolute()))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb  # takes a second, and is not needed where it is disabled

    mode = cfg.wandb.mode.value
    if cfg.wandb.mode is WandbMode.auto:
        mode = "online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "offline"
    run = wandb.init(
        id=wandb_id,
        resume="allow" if mode == "online" else None,
        project=cfg.wandb.project,
        group=cfg.experiment,
        name=directory.name,
        config={**config, "environment": environment},
        mode=mode,
        settings=wandb.Settings(init_timeout=cfg.wandb.timeout, console="off", x_disable_stats=mode == "offline"),
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def _logged_in() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
