"""What a run writes down, on rank 0: metrics.jsonl (the truth, which W&B mirrors), and lines in logs/train.log, which
are on stdout too, or above a live panel where that is a terminal.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from configs.schema import Config
from data import batches
from data.loader import Loader
from launch.panel import Panel, clock, has_screen, unit
from launch.tracking import Tracker, identity


class RunLog:
    """Open for the length of a run."""

    def __init__(self, cfg: Config, config_text: str, environment: dict[str, Any], wandb_id: str):
        self.steps = cfg.train.steps
        self.directory = Path(cfg.run.dir)
        (self.directory / "logs").mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(config_text)
        (self.directory / "exit.json").unlink(missing_ok=True)  # of the process before
        (self.directory / "environment.json").write_text(json.dumps(environment, indent=1))
        self.wandb_id = identity(self.directory, wandb_id)
        self.file = _append(self.directory / "metrics.jsonl")
        self.lines = _append(self.directory / "logs" / "train.log")
        self.panel = Panel(self.directory.name, self.steps) if has_screen() else None
        self.wandb = Tracker(cfg, self._warn)
        self.started, self.first = time.monotonic(), None
        self.batch: Optional[int] = None  # that came last
        self.full = False  # of the disk is known that it takes nothing

    def position(self, step: int, loader: Loader) -> None:
        """Keep where the data stands after `step`, wherever the next batch does not simply follow (data/batches.py)."""
        number, _ = loader.coming
        if self.batch is None or number != self.batch + 1:
            self._try(lambda: batches.append(self.directory, step, loader))
        if number != loader.batch + 1:
            self._say(f"step {step + 1} passes over batches {loader.batch + 1} to {number - 1}")
        self.batch = number

    def step(self, metrics: dict[str, Any]) -> None:
        """One logged step."""
        self._write(metrics)
        if self.first is None:
            self.first = metrics["step"]
            self.started = time.monotonic()
        done = metrics["step"] - self.first
        left = (time.monotonic() - self.started) / done * (self.steps - metrics["step"]) if done else None
        self._say(_line(metrics, self.steps, left), shown=self.panel is not None)
        if self.panel:
            self.panel.show({**metrics, "left_s": left})

    def skipped(self, step: int, tokens: int, why: str, count: int, seen: dict[str, float]) -> None:
        """One step whose update was left out: `seen` is what was wrong, numbers or not."""
        seen = {f"seen_{k}": v for k, v in _json(seen).items()}
        self._write({"step": step, "tokens": tokens, "update_skipped": why, "updates_skipped": count, **seen})
        self._say(f"step {step:>6}/{self.steps}  update left out, {count} so far: {why}  {seen}")

    def bundle(self, path: Path, content: dict[str, Any]) -> None:
        """What there is to see where a run ended badly."""
        self._try(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        self._try(lambda: path.write_text(json.dumps(_json(content), indent=1)))

    def validation(self, metrics: dict[str, Any]) -> None:
        """One evaluation."""
        self._write(metrics)
        self._say(f"step {metrics['step']:>6}/{self.steps}  validation loss {metrics['val_loss']:.4f}")
        if self.panel:
            self.panel.show({"val_loss": metrics["val_loss"]})

    def rolled_back(self, tokens: int, entries: list[dict[str, Any]]) -> None:
        """The run went back, for the last of these reasons."""
        last = entries[-1]
        self._write({"tokens": tokens, "rolled_back": len(entries), **last})
        past = "batches {} to {}".format(*last["batches"])
        self._say(f"step {last['step']}: {last['why']}; back to step {last['to']}, past {past}")

    def saved(self, figures: dict[str, Any]) -> None:
        """One save: how long training stood still for it, how long it took behind it; or why it failed."""
        self._write(figures)
        if "save_failed" in figures:
            self._say(f"warning: no checkpoint of step {figures['step']}: {figures['save_failed']}")

    def health(self, metrics: dict[str, Any]) -> None:
        """What sparse attention does; too much for the terminal."""
        self._write(metrics)

    def say(self, line: str) -> None:
        """A line that is no measurement."""
        self._say(line)

    def close(self, code: int, reason: str, goodput: float) -> None:
        """Write exit.json, end the W&B run and leave the panel's last picture."""
        self.say(f"ends with code {code}: {reason}; {goodput:.1%} of the time since the first start went into steps")
        end = {"code": code, "reason": reason, "goodput": goodput}
        self._try(self.file.close)
        self._try(lambda: (self.directory / "exit.json").write_text(json.dumps(end)))
        self.wandb.finish(code)
        if self.panel:
            self.panel.close()

    def _write(self, metrics: dict[str, Any]) -> None:
        self._try(lambda: self.file.write(json.dumps(metrics) + "\n"))

    def _try(self, write: Callable[[], Any]) -> None:
        """A full disk ends a run where a checkpoint needs it; lines wait in the file's buffer until there is room."""
        try:
            write()
        except OSError as e:
            known, self.full = self.full, True
            if not known:
                self._warn(f"warning: {self.directory}: {e}; metrics may be missing")

    def _say(self, line: str, shown: bool = False) -> None:
        """A line in the log, and for the user, unless the panel has shown what it says."""
        self._try(lambda: self.lines.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n"))
        if shown:
            return
        if self.panel:
            self.panel.say(line)
        else:
            print(line, flush=True)

    def _warn(self, line: str) -> None:
        """Called by other threads too."""
        if self.panel:
            self._say(line)
            return
        self._say(line, shown=True)
        print(line, file=sys.stderr, flush=True)


def _append(path: Path) -> Any:
    """The file, open at its end; half a line there, where a run was killed, is cut off."""
    if path.exists():
        with open(path, "rb+") as file:
            begin = max(0, path.stat().st_size - 2**20)  # no line is longer
            file.seek(begin)
            file.truncate(begin + file.read().rfind(b"\n") + 1)
    return open(path, "a", buffering=1)


def _line(m: dict[str, Any], steps: int, left: Optional[float]) -> str:
    parts = [
        f"step {m['step']:>6}/{steps}",
        f"{m['tokens']:,} tokens",
        f"loss {m['loss']:.4f}",
        f"norm {m['grad_norm']:.3f}",
        f"lr {m['lr']:.2e}",
        f"{m['tokens_per_s_per_gpu']:,.0f} tokens/s per {unit()}",
        f"{m['model_tflops']:.3g} TFLOP/s",
        "" if m["mfu"] is None else f"MFU {m['mfu']:.1%}",
        "" if m["speedup_vs_full"] is None else f"{m['speedup_vs_full']:.2f}x full{_calibrated(m)}",
        f"{m['mem_gib']:.2f} GiB",
        f"data {m['data_wait_s']:.3f} s",
        "" if left is None else f"{clock(left)} left",
    ]
    return "  ".join(p for p in parts if p)


def _calibrated(m: dict[str, Any]) -> str:
    return " (calibrated)" if m["speedup_from"].startswith("calibration") else ""


def _json(value: Any) -> Any:
    """Numbers that JSON has no word for, as text."""
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
