"""python -m launch.bench [--row NAME | --rows 1gpu]: the speed table of the README, each row by one training run.

A row is a run of train.py in a fresh folder: warm-up, then measured steps. Its tokens/s and MFU are medians over the
intervals between logged steps, its memory is rank 0's peak beside what launch.plan says of that rank, its bars stand in
launch/rows.py. A sparse row also runs its full-attention twin. The JSON is written anew after each row.
Exit codes: 0; 64 for a row that is none or needs more GPUs than there are; 70 if a row gave no figures.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, RunError, exit_code
from configs.options import Options, number, place, write
from launch import plan
from launch.cluster import GIB, GPUS, Cluster
from launch.rows import ROWS, Row

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("tokens_per_s", "mfu", "step_s")


def measure(row: Row, steps: int, every: int, limit: float) -> dict[str, Any]:
    """Run a row for `steps` steps, logged each `every`, for at most `limit` seconds. The first interval is warm-up.

    Returns its figures: None for those that it did not come to.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder, "run")
        overrides = [*row.overrides.split(), f"train.steps={steps}", f"train.log_every={every}", f"run.dir={directory}"]
        ended = _run(row.processes, overrides, limit, Path(folder, "output"))
        intervals = _intervals(directory)
        environment = _read(directory / "environment.json")
        said = Path(folder, "output").read_text(errors="replace").strip().splitlines()
    values = {key: [m[key] for m in intervals[1:] if m.get(key) is not None] for key in KEYS}
    figures: dict[str, Any] = {key: statistics.median(v) if v else None for key, v in values.items()}
    speeds = values["tokens_per_s"]
    return {
        "row": row.name,
        "gpus": row.gpus,
        "overrides": row.overrides,
        "ended": ended,
        "intervals": len(speeds),
        **figures,
        "slowest": min(speeds, default=None),
        "fastest": max(speeds, default=None),
        "peak_gib": intervals[-1]["mem_gib"] if intervals else None,
        "plan_gib": planned(row),
        "must": row.must,
        "aim": row.aim,
        "peers": row.peers,
        "environment": environment,
        "said": "" if ended == "done" else "\n".join(said[-5:]),
    }


def planned(row: Row) -> float:
    """What launch.plan says that rank 0 has allocated at its peak, in GiB."""
    cluster = Cluster(row.processes, GPUS["h200"])
    return plan.plan(plan.read(row.overrides.split(), row.processes), cluster).stages[0].peak / GIB


def _run(processes: int, overrides: list[str], limit: float, output: Path) -> str:
    """How it ended: done, after the limit, or with which exit code."""
    start = [sys.executable, str(ROOT / "train.py")]
    if processes > 1:
        start = [str(ROOT / "launch/local.sh"), "-n", str(processes)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with open(output, "w") as out:
        child = subprocess.Popen(
            [*start, *overrides], stdout=out, stderr=out, env=env, cwd=ROOT, start_new_session=True
        )
    try:
        code = child.wait(limit)
    except subprocess.TimeoutExpired:
        return f"after the limit of {limit:.0f} s"
    finally:  # also where the benchmark is interrupted
        _end(child)
    return "done" if code == 0 else f"exit code {code}"


def _end(child: subprocess.Popen, patience: float = 60.0) -> None:
    """Ask a run that still goes on to stop, which ends the processes that torchrun made too; if need be, kill it."""
    child.terminate()
    try:
        child.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _intervals(directory: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    try:
        lines = (directory / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [m for m in map(json.loads, lines) if "tokens_per_s" in m]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def table(results: list[dict[str, Any]]) -> Table:
    """One line a row."""
    out = Table(box=box.SIMPLE)
    out.add_column("row")
    for heading in ("tokens/s", "slowest", "fastest", "MFU", "peak GiB", "planned", "must", "aim"):
        out.add_column(heading, justify="right")
    for heading in ("peers", "ended"):
        out.add_column(heading, overflow="fold")
    for r in results:
        speeds = [f"{r[key] or 0:,.0f}" for key in ("tokens_per_s", "slowest", "fastest")]
        gib = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f}"
        bars = [f"{r[key]:,.0f}" if r[key] else "" for key in ("must", "aim")]
        mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
        out.add_row(r["row"], *speeds, mfu, gib, f"{r['plan_gib']:.1f}", *bars, r["peers"], r["ended"], style=_style(r))
    return out


def _style(r: dict[str, Any]) -> str:
    if not r["must"]:
        return ""
    return "green" if (r["tokens_per_s"] or 0) >= r["must"] else "red"


def chosen(row: Optional[str], rows: str) -> list[Row]:
    """The rows asked for. Raises ConfigError."""
    if row is not None:
        found = [r for r in ROWS if r.name == row]
        if not found:
            names = ", ".join(r.name for r in ROWS)
            raise ConfigError("option", f"--row {row}", "no such row", f"give one of {names}")
    else:
        found = [r for r in ROWS if r.gpus and rows in ("all", f"{r.gpus}gpu")]
    needed, there = max(r.gpus for r in found), torch.cuda.device_count()
    if needed > there:
        where = f"--row {row}" if row else f"--rows {rows}"
        raise ConfigError("option", where, f"needs {needed} GPUs, there are {there}", "give --row tiny to try it here")
    return found


def bench(args: argparse.Namespace) -> None:
    """Measure, print and write. Raises RunError."""
    if not 0 < 2 * args.every <= args.steps:
        why = "leave no interval after the warm-up"
        raise ConfigError("option", f"--steps {args.steps} --every {args.every}", why, "give at least two intervals")
    rows = chosen(args.row, args.rows)
    _write(args.json, [])
    every = [r for row in rows for r in ([row, row.twin] if args.twins else [row]) if r is not None]
    console, results = Console(width=None if sys.stdout.isatty() else 160), []
    for row in every:
        console.print(f"{row.name}: {row.overrides}", highlight=False, soft_wrap=True)
        results.append(measure(row, args.steps, args.every, args.limit))
        if results[-1]["said"]:
            console.print(results[-1]["said"], highlight=False, soft_wrap=True, markup=False)
        _write(args.json, results)
    console.print(table(results))
    bad = [r["row"] for r in results if r["tokens_per_s"] is None]
    if bad:
        raise RunError("row", ", ".join(bad), "gave no figures", f"see {args.json}, or raise --limit")


def _write(path: Path, results: list[dict[str, Any]]) -> None:
    write("--json", path, json.dumps(results, indent=1) + "\n")


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = Options("python -m launch.bench", (__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--row", help="one of them (see launch/rows.py); tiny needs no GPU")
    counts = ("1gpu", "2gpu", "4gpu", "all")
    parser.add_argument("--rows", choices=counts, default="1gpu", help="all of this many GPUs (1gpu)")
    parser.add_argument("--twins", action=argparse.BooleanOptionalAction, default=True, help="of sparse rows")
    parser.add_argument("--steps", type=number(int, 1), default=25, help="of each row (25)")
    parser.add_argument(
        "--every", type=number(int, 1), default=5, help="steps of an interval; the first is warm-up (5)"
    )
    parser.add_argument("--limit", type=number(float, 1), default=600.0, help="seconds of each run (600)")
    parser.add_argument("--json", type=place, default=Path("bench.json"), help="the figures (bench.json)")
    return exit_code(lambda: bench(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
