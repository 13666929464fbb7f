"""The live panel, looked at as a terminal shows it; a terminal that nobody reads; plain lines elsewhere."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pyte
import pytest

from launch.panel import clock
from tests.test_train import ROOT, command

SCRIPT = """
import sys, time
from launch.panel import Panel, has_screen
assert has_screen()
begin = time.monotonic()
panel = Panel("my run", 1000)
numbers = dict(tokens=1_048_576, loss=2.5, lr=3e-4, grad_norm=0.25, tokens_per_s_per_gpu=45_678.9)
numbers |= dict(model_tflops=321.0, mfu=0.325, mem_gib=61.25, step_s=1.5)
numbers |= dict(data_wait_s=0.002, left_s=3723.5, speedup_vs_full=None)
for i in range(int(sys.argv[1])):
    panel.say("a line of text [not markup] " + "x" * 60)
    panel.show({**numbers, "step": 500 - int(sys.argv[1]) + i + 1})
shown = time.monotonic() - begin
time.sleep(0.8)
panel.close()
print(f"{shown:.3f} {time.monotonic() - begin:.3f}", file=sys.stderr)
"""


@contextmanager
def terminal(columns: int, rows: int = 40) -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal of that size."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def start(command: list[str], theirs: int, term: str = "xterm-256color", stderr: int = subprocess.PIPE):
    env = {**os.environ, "TERM": term, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=stderr, env=env)
    os.close(theirs)
    return process


def watch(ours: int, screen: pyte.Screen) -> list[str]:
    """What the terminal shows at the end."""
    stream = pyte.ByteStream(screen)
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the program is gone
            return [line.rstrip() for line in screen.display]
        if not data:
            return [line.rstrip() for line in screen.display]
        stream.feed(data)


def test_a_run_on_a_terminal(corpus, tmp_path):
    run = tmp_path / "run"
    screen = pyte.HistoryScreen(100, 24, history=1000)
    with terminal(100, 24) as (ours, theirs):
        process = start(command(corpus, run, "train.steps=30", "train.eval_every=15"), theirs)
        shown = "\n".join(watch(ours, screen))
        assert process.wait(60) == 0, process.stderr.read()
    assert "step 30 of 30" in shown
    for label in ("tokens 15,360", "loss ", "validation ", "lr ", "gradient norm ", "tokens/s per process ", "memory "):
        assert label in shown
    for label in ("data wait ", "time left 0:00", "TFLOP/s "):
        assert label in shown
    assert shown.count("╭") == 1, "drawn in place, not one below another"
    assert "step     15/30  validation loss" in shown
    assert "step     14/30" not in shown
    log = (run / "logs" / "train.log").read_text().splitlines()
    assert len([line for line in log if "  loss " in line]) == 30
    parts = ("step ", "tokens", "norm", "lr", "tokens/s per process", "GiB", "data", "left")
    assert all(part in log[5] for part in parts)


@pytest.mark.parametrize("columns", [200, 80, 34, 12, 3])
def test_any_width(columns):
    with terminal(columns) as (ours, theirs):
        process = start([sys.executable, "-c", SCRIPT, "1"], theirs)
        shown = watch(ours, pyte.Screen(columns, 40))
        assert process.wait(30) == 0, process.stderr.read()
    if columns < 12:
        return
    text = "\n".join(shown)
    frame = [line for line in shown if line[:1] in "│╭╰" and line]
    assert {len(line) for line in frame} == {columns}, "no line is wrapped by the terminal"
    if columns >= 34:
        for part in (
            "my run",
            "step 500 of 1,000",
            "tokens 1,048,576",
            "MFU 32.5%",
            "memory 61.25 GiB",
            "time left 1:02:0",
        ):
            assert part in text
        assert "[not markup]" in text


def test_a_terminal_that_nobody_reads_holds_nothing_up():
    with terminal(80) as (_ours, theirs):  # its buffer holds a few kilobytes
        process = start([sys.executable, "-c", SCRIPT, "2000"], theirs)
        shown, whole = map(float, process.communicate(timeout=60)[1].split())
        assert process.returncode == 0
    print(f"2000 steps shown in {shown:.3f} s")
    assert shown < 0.5
    assert whole < 5


def test_a_dumb_terminal_is_no_screen():
    with terminal(100) as (ours, theirs):
        process = start(
            [sys.executable, "-c", "from launch.panel import has_screen; print(has_screen())"], theirs, "dumb"
        )
        assert watch(ours, pyte.Screen(100, 40))[0] == "False"
        assert process.wait(30) == 0


def test_clock():
    assert [clock(s) for s in (-3, 0, 61.9, 3600, 90061)] == ["0:00", "0:00", "1:01", "1:00:00", "25:01:01"]
