"""python -m launch.compare RUN RUN...: what runs cost and reached, side by side, with where each was measured."""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import matplotlib
import yaml
from rich.console import Console
from rich.table import Table

from configs.errors import CheckpointError, RunError

matplotlib.use("Agg")
from matplotlib import pyplot


@dataclass(frozen=True)
class Measured:
    """One run directory."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]  # lines of training steps, in order, the last one for each step
    validation: list[dict[str, Any]]

    @property
    def is_full(self) -> bool:
        return self.config["attention"]["kind"] == "full"

    def settled(self, key: str) -> Optional[float]:
        """Median over the later half of the steps, when compilation and caches have settled."""
        values = [s[key] for s in self.steps[len(self.steps) // 2 :] if s.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def loss(self) -> float:
        """Mean training loss of the last ten logged steps."""
        return statistics.fmean(s["loss"] for s in self.steps[-10:])

    @property
    def validation_loss(self) -> Optional[float]:
        return self.validation[-1]["val_loss"] if self.validation else None


def read(directory: str) -> Measured:
    """A run directory. Raises CheckpointError if it is none."""
    path = Path(directory)
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
        environment = json.loads((path / "environment.json").read_text())
        lines = _lines((path / "metrics.jsonl").read_text())
        steps = {m["step"]: m for m in lines if "loss" in m}  # a resumed run repeats steps: the last line counts
        validation = {m["step"]: m for m in lines if "val_loss" in m}
    except (OSError, ValueError, KeyError, yaml.YAMLError) as e:
        why = f"not readable ({type(e).__name__} {e})"
        raise CheckpointError("run", path, why, "give directories that train.py has made") from e
    if not steps:
        raise CheckpointError("run", path, "has no logged step yet", "wait for its first step")
    in_order = [[found[k] for k in sorted(found)] for found in (steps, validation)]
    return Measured(path.name, config, environment, *in_order)


def _lines(text: str) -> list[dict[str, Any]]:
    """Objects of a JSON lines file; a half line at the end, where a run was killed, is left out."""
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


COLUMNS = {  # heading: how to show it
    "attention": lambda r: r.config["attention"]["kind"],
    "steps": lambda r: f"{r.steps[-1]['step']:,}",
    "tokens": lambda r: f"{r.steps[-1]['tokens'] / 1e6:,.2f} M",
    "loss": lambda r: f"{r.loss:.4f}",
    "validation": lambda r: _show(r.validation_loss, "{:.4f}"),
    "tokens/s": lambda r: _show(r.settled("tokens_per_s"), "{:,.0f}"),
    "step": lambda r: _show(r.settled("step_s"), "{:.3f} s"),
    "model TFLOP/s": lambda r: _show(r.settled("model_tflops"), "{:.3g}"),
    "MFU": lambda r: _show(r.settled("mfu"), "{:.1%}"),
    "memory": lambda r: f"{max(s['mem_gib'] for s in r.steps):.2f} GiB",
}


def _show(value: Optional[float], how: str) -> str:
    return "-" if value is None else how.format(value)


def table(runs: list[Measured]) -> Table:
    """One row a run."""
    out = Table(title="runs (speeds: median of the later half of the steps, per run; TFLOP/s per device)")
    out.add_column("run", overflow="fold")
    for heading in COLUMNS:
        out.add_column(heading, justify="right")
    for run in runs:
        out.add_row(run.name, *(show(run) for show in COLUMNS.values()))
    return out


def ratios(runs: list[Measured]) -> list[str]:
    """Each sparse run against the first full-attention run of the list, in words."""
    full = next((r for r in runs if r.is_full), None)
    if full is None:
        return ["no full-attention run among these: no speed-up to show"]
    out = []
    for run in (r for r in runs if not r.is_full):
        speed = run.settled("tokens_per_s") / full.settled("tokens_per_s")
        saving = run.settled("flop_saving")
        context = f"{run.config['data']['seq_len']} tokens of context"
        out.append(f"{run.name} against {full.name} at {context}: {speed:.2f}x its tokens/s, {_where(run, full)};")
        out.append(f"  {saving:.2f}x fewer model FLOPs by formula; training loss {run.loss - full.loss:+.4f}")
    return out


def _where(run: Measured, full: Measured) -> str:
    places = [f"measured on {r.environment['world']} x {r.environment['device']}" for r in (run, full)]
    return places[0] if places[0] == places[1] else f"{places[0]} (baseline {places[1]})"


ALIKE = {  # what must agree for a comparison of like with like
    "data": lambda r: r.environment.get("data_fingerprint"),
    "device": lambda r: r.environment.get("device"),
    "number of processes": lambda r: r.environment.get("world"),
    "seed": lambda r: r.config["seed"],
    "data.seq_len": lambda r: r.config["data"]["seq_len"],
    "train.global_batch": lambda r: r.config["train"]["global_batch"],
    "train.precision": lambda r: r.config["train"]["precision"],
    "model": lambda r: r.config["model"],
    "optim": lambda r: r.config["optim"],
    "steps": lambda r: r.steps[-1]["step"],
}


def warnings(runs: list[Measured]) -> list[str]:
    """One line for each thing in which the runs are not alike."""
    out = []
    for what, of in ALIKE.items():
        values = [of(r) for r in runs]
        if any(v != values[0] for v in values):
            shown = ", ".join(f"{r.name}: {str(v)[:60]}" for r, v in zip(runs, values))
            out.append(f"warning: not like with like: {what} differs ({shown})")
    return out


def draw(runs: list[Measured], path: Path) -> None:
    """Loss against tokens, and tokens/s against tokens."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for run in runs:
        tokens = [s["tokens"] / 1e6 for s in run.steps]
        (line,) = left.plot(tokens, [s["loss"] for s in run.steps], label=run.name)
        seen = [v["tokens"] / 1e6 for v in run.validation]
        marks = [v["val_loss"] for v in run.validation]
        left.plot(seen, marks, "o", color=line.get_color(), label=f"{run.name}, validation" if marks else None)
        right.plot(tokens, [s["tokens_per_s"] for s in run.steps], color=line.get_color(), label=run.name)
    left.set(xlabel="tokens (millions)", ylabel="loss (nats)", title="loss")
    right.set(xlabel="tokens (millions)", ylabel="tokens/s", title="throughput", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.compare", description=__doc__.split(": ", 1)[1])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="picture of the curves")
    args = parser.parse_args(argv)
    try:
        runs = [read(directory) for directory in args.runs]
    except RunError as e:
        print(e, file=sys.stderr)
        return e.code
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(runs))
    for line in [*ratios(runs), *warnings(runs)]:
        console.print(line, highlight=False, soft_wrap=True)
    draw(runs, args.output)
    console.print(f"curves: {args.output}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
