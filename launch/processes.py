"""The processes below a launcher: started so that none outlives it, asked to stop, ended."""

import contextlib
import ctypes
import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
# torchrun dies of signals that it does not know, and waits 30 s for the others' effect unless it can be told otherwise.
SIGNALS = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
SHUTDOWN = ["--shutdown-timeout", "280"]


def die_with_parent() -> None:
    """From now on the kernel kills this process when the one that started it is gone (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command: list[str], env: dict[str, str]) -> subprocess.Popen:
    """In a session of its own: a Ctrl-C on the terminal is for the launcher, who passes it on."""
    return subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=die_with_parent)


def torchrun() -> list[str]:
    """The command, with what this version knows of the options that let a run save before it stops."""
    source = Path(*importlib.util.find_spec("torch").submodule_search_locations, "distributed", "run.py")
    more = SHUTDOWN if SHUTDOWN[0] in source.read_text() else []
    return [sys.executable, "-m", "launch.elastic", "--max-restarts", "0", *SIGNALS, *more]


def ask(launcher: subprocess.Popen, number: int, ranks: int) -> None:
    """Pass a signal on to the `ranks` below torchrun, past it: it forwards not all, and kills who takes long to save.

    Before there are all of them there is nothing to save, and torchrun is told to end. With 0 the launched process is
    the run itself.
    """
    found = [p for p in _below(launcher.pid, recursive=False) if _is_rank(p)]
    if not ranks:
        launcher.send_signal(number)
    elif len(found) < ranks:
        launcher.terminate()
    for p in found if ranks else []:
        _send(p, number)


def end(launcher: subprocess.Popen) -> None:
    """Kill whatever is left of it, and wait until it is gone."""
    left = _below(launcher.pid)
    launcher.kill()
    for p in left:
        _send(p, signal.SIGKILL)
    launcher.wait()
    psutil.wait_procs(left, timeout=10)


def _below(pid: int, recursive: bool = True) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=recursive)
    except psutil.NoSuchProcess:
        return []


def _is_rank(p: psutil.Process) -> bool:
    try:
        return "RANK" in p.environ()
    except psutil.Error:
        return False


def _send(p: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        p.send_signal(number)
