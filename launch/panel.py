"""The live panel of a run on a terminal: its latest numbers in place, lines of text above them.

A thread of its own writes to the terminal: one that is slow, or held by Ctrl-S, holds up no step.
"""

import os
import sys
import threading
import time
from collections import deque
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel as Frame
from rich.progress_bar import ProgressBar
from rich.text import Text

PERIOD = 0.5  # seconds between two pictures
PATIENCE = 2.0  # seconds that the end of a run waits for the terminal

CELLS = (  # label, name in metrics.jsonl, how to show it; a cell is left out while its number is not known
    ("tokens", "tokens", "{:,}"),
    ("loss", "loss", "{:.4f}"),
    ("validation", "val_loss", "{:.4f}"),
    ("lr", "lr", "{:.2e}"),
    ("gradient norm", "grad_norm", "{:.3f}"),
    ("tokens/s per {unit}", "tokens_per_s_per_gpu", "{:,.0f}"),
    ("TFLOP/s", "model_tflops", "{:.3g}"),
    ("MFU", "mfu", "{:.1%}"),
    ("memory", "mem_gib", "{:.2f} GiB"),
    ("step", "step_s", "{:.3f} s"),
    ("data wait", "data_wait_s", "{:.3f} s"),
    ("goodput", "goodput", "{:.1%}"),
)


def unit() -> str:
    """What a rank of the run has to itself, in the words of its user."""
    return "GPU" if torch.cuda.is_available() else "process"


def has_screen() -> bool:
    """Whether stdout is a terminal that can draw over what it shows."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


class Panel:
    """On the terminal until `close`; none of the calls waits for it."""

    def __init__(self, name: str, steps: int):
        self.name, self.steps = name, steps
        self.numbers: dict[str, Any] = {"step": 0}
        self.changed = time.monotonic()
        self.lines: deque[str] = deque()
        self.ending = threading.Event()
        # A file of its own: the end of the process must not wait for the lock of a writer that is stuck.
        self.console = Console(file=open(os.dup(sys.stdout.fileno()), "w", encoding="utf-8"))  # noqa: SIM115
        self.thread = threading.Thread(target=self._run, name="panel", daemon=True)
        self.thread.start()

    def show(self, numbers: dict[str, Any]) -> None:
        """The latest ones, under the names of metrics.jsonl and `left_s`; others stay as they were."""
        self.numbers, self.changed = {**self.numbers, **numbers}, time.monotonic()

    def say(self, line: str) -> None:
        """A line above the panel."""
        self.lines.append(line)

    def close(self) -> None:
        """Leave the last picture behind."""
        self.ending.set()
        self.thread.join(PATIENCE)

    def _run(self) -> None:
        # What others write to stdout and stderr goes where they send it, and never waits for this thread.
        quiet = {"redirect_stdout": False, "redirect_stderr": False}
        with Live(console=self.console, auto_refresh=False, get_renderable=self.picture, **quiet) as live:
            while not self.ending.wait(PERIOD):
                self._draw(live)
            self._draw(live)

    def _draw(self, live: Live) -> None:
        while self.lines:
            live.console.print(self.lines.popleft(), markup=False, highlight=False)
        live.refresh()

    def picture(self) -> RenderableType:
        """As wide as the terminal: as many cells beside one another as fit."""
        m, age = self.numbers, time.monotonic() - self.changed
        known = [(label.format(unit=unit()), how.format(m[key])) for label, key, how in CELLS if m.get(key) is not None]
        cells = [_cell(label, value) for label, value in known]
        if m.get("left_s") is not None:
            cells.append(_cell("time left", clock(m["left_s"] - age)))
        cells.append(_cell("logged", f"{clock(age)} ago"))
        head = Text(f"step {m['step']:,} of {self.steps:,}", no_wrap=True, overflow="ellipsis")
        bar = Padding(ProgressBar(total=max(self.steps, 1), completed=m["step"]), 0)
        parts: list[RenderableType] = [head, bar, Columns(cells)]
        if m.get("speedup_vs_full") is not None:
            parts.append(Text(f"{m['speedup_vs_full']:.2f}x the tokens/s of full attention ({m['speedup_from']})"))
        return Frame(Group(*parts), title=Text(self.name, overflow="ellipsis"), title_align="left")


def _cell(label: str, value: str) -> Text:
    return Text.assemble((f"{label} ", "dim"), (value, "bold"))


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour; nothing below zero."""
    minutes, s = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
