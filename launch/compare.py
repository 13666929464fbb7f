"""python -m launch.compare RUN...: what runs cost and reached, side by side, with where each was measured.

Prints a table and writes an HTML report. RUN is a run directory, or one that holds several, such as a sweep's.
Exit codes: 0; 64 for a bad option; 66 for what is no run.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Optional

from rich.console import Console
from rich.table import Table

from configs.errors import CheckpointError, ConfigError, exit_code
from configs.options import Options, filled, place, write
from launch.runs import Measured, differences, find, pace, read

COLUMNS = {  # heading: how to show it
    "attention": lambda r: r.config["attention"]["kind"],
    "context": lambda r: f"{r.context:,}",
    "steps": lambda r: f"{r.steps[-1]['step']:,}",
    "tokens": lambda r: _count(r.steps[-1]["tokens"]),
    "loss": lambda r: f"{r.loss:.4f}",
    "validation": lambda r: _show(r.validation_loss, "{:.4f}"),
    "tokens/s": lambda r: _show(r.settled("tokens_per_s"), "{:,.0f}"),
    "step": lambda r: _show(r.settled("step_s"), "{:.3f} s"),
    "model TFLOP/s": lambda r: _show(r.settled("model_tflops"), "{:.3g}"),
    "MFU": lambda r: _show(r.settled("mfu"), "{:.1%}"),
    "data wait": lambda r: _show(r.settled("data_wait_s"), "{:.3f} s"),
    "memory": lambda r: f"{r.memory:.2f} GiB",
}
TITLE = "loss: mean of the last ten logged steps; speeds: median of the later half; TFLOP/s per device; memory: rank 0"


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:,.2f} M" if tokens >= 1e6 else f"{tokens:,}"


def _show(value: Optional[float], how: str) -> str:
    return "-" if value is None else how.format(value)


def table(runs: list[Measured]) -> Table:
    """One row a run."""
    out = Table(title=TITLE)
    out.add_column("run", overflow="fold", min_width=min(24, max(len(run.name) for run in runs)))
    for heading in COLUMNS:
        out.add_column(heading, justify="right")
    for run in runs:
        out.add_row(run.name, *(show(run) for show in COLUMNS.values()))
    return out


def sparsity(runs: list[Measured]) -> Optional[Table]:
    """One row a sparse run: its last measurement of each kind, mean of the layers."""
    found = {r.name: {key: values[-1][1] for key, values in r.sparsity().items()} for r in runs if r.health}
    if not found:
        return None
    out = Table("run", title="sparsity at the last measurement, mean of the layers")
    kinds = list(dict.fromkeys(kind for kinds in found.values() for kind in kinds))
    for kind in kinds:
        out.add_column(kind.replace("_", " "), justify="right")
    for name, seen in found.items():
        out.add_row(name, *(_show(fmean(seen[kind]) if kind in seen else None, "{:.3f}") for kind in kinds))
    return out


def changes(runs: list[Measured]) -> Optional[Table]:
    """One row an option in which the configurations differ, one column a run."""
    rows = differences([{k: v for k, v in r.config.items() if k not in NO_OPTION} for r in runs])
    if not rows:
        return None
    out = Table("option", title="configurations where they differ")
    for run in runs:
        out.add_column(run.name, overflow="fold")  # whole: runs of a sweep may differ in the last letter
    for key, values in rows.items():
        out.add_row(key, *map(str, values))
    return out


NO_OPTION = ("run", "wandb", "experiment")  # they name a run and change nothing in it


def alike(run: Measured) -> dict[str, Any]:
    """What must agree for a comparison of like with like."""
    more = {key: run.config[key] for key in ("seed", "model", "optim")} | {"data.seq_len": run.context}
    more |= {"data": run.environment.get("data_fingerprint"), "steps": run.steps[-1]["step"]}
    return pace(run.config, run.environment) | more


def unlike(a: Measured, b: Measured) -> dict[str, list[Any]]:
    """The things in which two runs should agree and do not, with what they are in each."""
    return differences([alike(a), alike(b)])


def baseline(run: Measured, runs: list[Measured]) -> Optional[Measured]:
    """The full-attention run at the same context that is most like `run`, among equals its own twin; None for a full
    run, or without any."""
    twins = [r for r in runs if r.is_full and not run.is_full and r.context == run.context]
    return min(twins, key=lambda twin: (len(unlike(run, twin)), twin.name != f"{run.name}-full"), default=None)


def speedup(run: Measured, full: Measured) -> float:
    """Tokens/s of a run over its baseline's."""
    return run.settled("tokens_per_s") / full.settled("tokens_per_s")


def ratios(runs: list[Measured]) -> list[str]:
    """Each sparse run against its full-attention baseline, in words, with where both were measured."""
    out = []
    for run in sorted((r for r in runs if not r.is_full), key=lambda r: r.context):
        context, full = f"at {run.context} tokens of context", baseline(run, runs)
        if full is None:
            out.append(f"{run.name}: no full-attention run {context} among these, so no speed-up{_logged(run)}")
            continue
        saving = _show(run.settled("flop_saving"), "full attention needs {:.2f}x its model FLOPs by formula; ")
        steps = f"medians of {run.timed} and {full.timed} logged steps"
        speed = f"{speedup(run, full):.2f}x its tokens/s ({steps}), measured on {where(run, full)}"
        loss = f"training loss {run.loss - full.loss:+.4f}"
        out.append(f"{run.name} against {full.name} {context}: {speed};\n  {saving}{loss}")
    return out


def _logged(run: Measured) -> str:
    """The speed-up that a run has logged itself, with what it is against."""
    speedup = run.settled("speedup_vs_full")
    return f"; {speedup:.2f}x by its own log, against {run.steps[-1]['speedup_from']}" if speedup else ""


def where(run: Measured, full: Measured) -> str:
    """The device of a ratio; both where they are not the same."""
    return run.place if run.place == full.place else f"{run.place} (baseline measured on {full.place})"


def warnings(runs: list[Measured]) -> list[str]:
    """One line for each run that is unlike its baseline; where none has any, for each that is unlike the first."""
    pairs = [(run, full) for run in runs if (full := baseline(run, runs))] or [(run, runs[0]) for run in runs]
    out = []
    for run, other in pairs:
        found = [f"{what} differs ({str(a)[:60]}, {str(b)[:60]})" for what, (a, b) in unlike(run, other).items()]
        if found:
            out.append(f"warning: {run.name} and {other.name} are not like with like: {'; '.join(found)}")
    return out


def finished(directories: list[str]) -> list[str]:
    """The runs that are done; a line on stderr for each that is not. Raises CheckpointError if none is."""
    done = []
    for directory in directories:
        try:
            end = json.loads(Path(directory, "exit.json").read_text())
        except OSError:
            end = {"code": None, "reason": "it has not ended"}
        if end["code"] == 0:
            done.append(directory)
        else:
            print(f"left out: {directory}: {end['reason']}", file=sys.stderr, flush=True)
    if not done:
        raise CheckpointError("run", directories[0], "is not done, nor is another", "look at what the runs have said")
    return done


def named(paths: Iterable[Path]) -> list[Measured]:
    """The runs, by their names, or by their paths where two have the same name. Raises CheckpointError."""
    runs = {path: read(path) for path in paths}
    count = Counter(run.name for run in runs.values())
    return [run if count[run.name] == 1 else replace(run, name=str(path)) for path, run in runs.items()]


def compare(directories: list[str], output: Path) -> None:
    """Print the table of the runs at or below `directories`, and write the report. Raises RunError."""
    from launch import report  # matplotlib takes a second

    if output.suffix != ".html":
        raise ConfigError("option", f"--output {output}", "the report is HTML", "give a name that ends in .html")
    runs = named(dict.fromkeys(path for directory in directories for path in find(directory)))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table(runs))
    for more in filter(None, (sparsity(runs), changes(runs))):
        console.print(more)
    for line in [*ratios(runs), *warnings(runs)]:
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    write("--output", output, report.page(runs))
    console.print(f"report: {output}", highlight=False, soft_wrap=True, markup=False)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = Options("python -m launch.compare", __doc__.split(": ", 1)[1])
    parser.add_argument("runs", nargs="+", type=filled, metavar="RUN", help="run directory, or one that holds several")
    parser.add_argument("--output", type=place, default=Path("compare.html"), help="the report (.html)")
    parser.add_argument("--finished", action="store_true", help="leave out, with a line, RUNs that are not done")

    def work() -> None:
        args = parser.parse_args(argv)
        compare(finished(args.runs) if args.finished else args.runs, args.output)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
