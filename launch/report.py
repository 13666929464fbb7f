"""The comparison as one HTML page: no scripts, nothing from a network, the curves as SVG inside."""

import io
from collections.abc import Callable, Iterable
from html import escape
from statistics import fmean
from typing import Any

import matplotlib

from launch.compare import COLUMNS, TITLE, baseline, ratios, speedup, warnings, where
from launch.runs import Measured, differences, flat_rows

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

# The policy holds a browser to the promise: no request leaves this page.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Runs compared</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1300px; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; font-size: 13px }
td, th { border-bottom: 1px solid #ddd; padding: .3em .6em; text-align: right; white-space: nowrap }
td:first-child, th:first-child { text-align: left }
.warning { background: #fff3cd; padding: .4em .8em }
.charts { display: flex; flex-wrap: wrap; gap: 1em }
p { white-space: pre-line }
figure { margin: 0; flex: 1 1 460px; max-width: 640px } svg { width: 100%; height: auto }
</style></head><body>
"""


def page(runs: list[Measured]) -> str:
    """The whole report."""
    parts = [HEAD, "<h1>Runs compared</h1>", _runs(runs)]
    parts += ["<h2>Against full attention</h2>", *(f"<p>{escape(line)}</p>" for line in ratios(runs))]
    parts += [f'<p class="warning">{escape(line)}</p>' for line in warnings(runs)]
    parts += ['<div class="charts">', *charts(runs), "</div>"]
    parts += ["<h2>Configurations where they differ</h2>", _across(runs, differences([r.config for r in runs]))]
    parts += ["<h2>Measured where</h2>", _across(runs, flat_rows([r.environment for r in runs]))]
    return "\n".join([*parts, "</body></html>\n"])


def _runs(runs: list[Measured]) -> str:
    rows = [[run.name, run.place, *(show(run) for show in COLUMNS.values())] for run in runs]
    return _table(["run", "measured on", *COLUMNS], rows) + f"<p>{TITLE}.</p>"


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = ["".join(f"<th>{escape(str(cell))}</th>" for cell in head)]
    lines += ["".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def _across(runs: list[Measured], rows: dict[str, list[Any]]) -> str:
    """A row for each key, a column for each run."""
    return _table(["", *(r.name for r in runs)], ([key, *values] for key, values in rows.items()))


def charts(runs: list[Measured]) -> list[str]:
    """The figures, each as HTML."""
    out = [
        _chart(
            "Loss against tokens",
            "tokens (millions)",
            "loss (nats; dots: validation)",
            lambda axes: _loss_by_tokens(axes, runs),
        ),
        _chart("Loss against time", "training time (s)", "loss (nats)", lambda axes: _loss_by_time(axes, runs)),
        _chart("Throughput", "context (tokens)", "tokens/s", lambda axes: _speed(axes, runs)),
        _chart("Memory", "GiB at the most, rank 0", "", lambda axes: _memory(axes, runs)),
    ]
    if any(baseline(run, runs) for run in runs):
        ylabel = "x tokens/s of full attention"
        out.insert(3, _chart("Speed-up", "context (tokens)", ylabel, lambda axes: _speedup(axes, runs)))
    if any(_positions(run) for run in runs):
        y = "validation loss, last one"
        out.append(
            _chart("Loss by context", "from this token of the document on", y, lambda axes: _by_position(axes, runs))
        )
    for measure in dict.fromkeys(measure for run in runs for measure in run.sparsity()):
        title, y = f"Sparsity: {measure.replace('_', ' ')}", "mean of the layers, band from least to most"
        out.append(_chart(title, "tokens (millions)", y, lambda axes, m=measure: _health(axes, runs, m)))
    return out


def _chart(title: str, x: str, y: str, draw: Callable[[Axes], None]) -> str:
    # Names are shown as they are, a dollar sign too; text stays text; ids of one chart are not those of another.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": title}):
        figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
        draw(axes)
        lines = len(axes.get_legend_handles_labels()[0])
        axes.set(xlabel=x, ylabel=y, title=title)
        axes.grid(alpha=0.3)
        if lines:
            figure.set_figheight(4 + 0.2 * lines)
            figure.legend(loc="outside lower left", fontsize="small", frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return f"<figure>{text.getvalue()[text.getvalue().index('<svg') :]}</figure>"


def _loss_by_tokens(axes: Axes, runs: list[Measured]) -> None:
    for run in runs:
        (line,) = axes.plot([s["tokens"] / 1e6 for s in run.steps], [s["loss"] for s in run.steps], label=run.name)
        if run.validation:
            at, loss = ([v[key] for v in run.validation] for key in ("tokens", "val_loss"))
            axes.plot([t / 1e6 for t in at], loss, "o", color=line.get_color())


def _loss_by_time(axes: Axes, runs: list[Measured]) -> None:
    for run in runs:
        axes.plot(run.seconds(), [s["loss"] for s in run.steps], label=f"{run.name}, {run.place}")


def _speed(axes: Axes, runs: list[Measured]) -> None:
    points = [(f"{_variant(r, runs)}, {r.place}", r.context, r.settled("tokens_per_s")) for r in runs]
    _by_context(axes, points)


def _speedup(axes: Axes, runs: list[Measured]) -> None:
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    pairs = [(run, full) for run in runs if (full := baseline(run, runs))]
    points = [(f"{_variant(run, runs)}, {where(run, full)}", run.context, speedup(run, full)) for run, full in pairs]
    _by_context(axes, points)


def _by_context(axes: Axes, points: list[tuple[str, int, float]]) -> None:
    """A line for each label over context lengths."""
    for label in dict.fromkeys(p[0] for p in points):
        at = sorted(p[1:] for p in points if p[0] == label)
        axes.plot(*zip(*at), "o-", label=label)
    contexts = sorted({p[1] for p in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{c:,}" for c in contexts])
    axes.minorticks_off()
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def _variant(run: Measured, runs: list[Measured]) -> str:
    """The attention of a run, by what tells it from the other sparse ones."""
    if run.is_full:
        return "full"
    changed = differences([r.config["attention"] for r in runs if not r.is_full])
    values = {key: run.config["attention"].get(key) for key in changed}
    shown = {key: "+".join(value) if isinstance(value, list) else value for key, value in values.items()}
    return ", ".join(["nsa", *(f"{key}={value}" for key, value in shown.items())])


def _memory(axes: Axes, runs: list[Measured]) -> None:
    rows = range(len(runs))
    axes.barh(rows, [r.memory for r in runs])
    axes.set_yticks(rows, [r.name for r in runs])
    axes.invert_yaxis()


def _positions(run: Measured) -> dict[str, float]:
    last = run.validation[-1] if run.validation else {}
    return {key: value for key, value in last.items() if key.startswith("val_loss_from/")}


def _by_position(axes: Axes, runs: list[Measured]) -> None:
    ticks = set()
    for run in runs:
        if found := _positions(run):
            starts = [int(key.split("/")[1]) for key in found]
            axes.plot(starts, list(found.values()), "o-", label=f"{run.name}, {run.context:,} tokens")
            ticks |= set(starts)
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(sorted(ticks), [f"{start:,}" for start in sorted(ticks)], rotation=45)


def _health(axes: Axes, runs: list[Measured], measure: str) -> None:
    for run in runs:
        if lines := run.sparsity().get(measure):
            at, layers = [tokens / 1e6 for tokens, _ in lines], [values for _, values in lines]
            (line,) = axes.plot(at, [fmean(values) for values in layers], label=run.name)
            axes.fill_between(at, [min(v) for v in layers], [max(v) for v in layers], alpha=0.2, color=line.get_color())
