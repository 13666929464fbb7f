"""Finds a process of the run that hangs, says which and where, and ends the run.

When one process does not go on, the others soon wait for it in a collective, and all are late. Each has a thread that
looks at its own main thread once a second; the first to find it late calls the roll. Each thread answers with where its
process is and writes down the stacks of its Python threads. Who gives no answer is stopped or holds the interpreter;
else who waits in no collective is the one, where a device with work left counts as waiting: NCCL waits there. Between
calls nothing is sent, and devices are not asked.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Optional

import torch
import torch.distributed as dist

from configs.errors import HangError
from launch.clock import Clock
from parallel.mesh import Mesh

PERIOD = 1.0  # seconds between looks
ROLL = 5.0  # seconds in which a process has to answer
SLOW = 10  # times as long as a step may take what is no step: start, first step (it compiles), evaluation, saving
ROOT = Path(__file__).resolve().parent.parent


class Watchdog:
    """The thread of one process. `stop` it before the process ends."""

    def __init__(self, clock: Clock, mesh: Mesh, run: Path, timeout: float):
        """`timeout` in seconds is for a step."""
        self.clock, self.rank, self.world, self.run, self.timeout = clock, mesh.rank, mesh.world, run, timeout
        self.device = mesh.device
        self.main = threading.main_thread().ident
        self.store = _store(mesh.world)
        self._tell(f"who/{self.rank}", {"host": socket.gethostname(), "pid": os.getpid()})
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """The run is over."""
        self.done.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, looks = -1, 0  # looks without a change: time in which this process was stopped does not count
        while not self.done.wait(PERIOD):
            # By a thread of C, in case that this one does not get the interpreter for so long.
            faulthandler.dump_traceback_later(0.9 * self.timeout, file=sys.__stderr__)
            looks = looks + 1 if self.clock.changes == seen else 0
            seen = self.clock.changes
            patience = self.timeout if self.clock.phase == "step" else SLOW * self.timeout
            if looks * PERIOD >= patience or self._is_called():
                self._give_up()

    def _is_called(self) -> bool:
        try:
            return self.store.check(["roll"])
        except RuntimeError:  # the store is gone with the launcher that had it: the end of the run is under way
            return False

    def _give_up(self) -> None:
        """Answer the roll, be one of those who hear the verdict, and end the process."""
        try:
            self.store.set("roll", "called")
            step, phase = self.clock.step, self.clock.phase
            folder = self.run / "hang" / f"step-{step:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self.rank:05d}.txt", "w") as f:
                faulthandler.dump_traceback(f)
            frames = [f for thread, f in sys._current_frames().items() if thread != threading.get_ident()]
            at = place(sys._current_frames()[self.main])
            waits = any(waits_for_others(f) for f in frames) or unfinished(self.device)
            self._tell(f"answer/{self.rank}", {"step": step, "phase": phase, "at": at, "waits": waits})
            if self.store.add("callers", 1) == 1:
                self._judge(folder)
            self._end_the_silent(json.loads(self.store.get("verdict")))
        finally:  # also where the store is gone, with the machine that has it
            os._exit(HangError.code)

    def _judge(self, folder: Path) -> None:
        """Collect the answers, say who hangs, and leave it in exit.json and for the launcher."""
        end = time.monotonic() + ROLL
        while time.monotonic() < end and not self.store.check([f"answer/{r}" for r in range(self.world)]):
            time.sleep(0.1)
        answers = {r: self._told(f"answer/{r}") for r in range(self.world) if self.store.check([f"answer/{r}"])}
        found = suspects(answers, self.world)
        who = {r: self._told(f"who/{r}") for r in found}
        text = "; ".join(describe(r, who[r], answers.get(r)) for r in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        error = HangError("run", self.run, f"hangs: {text}{more}", f"the stacks of its processes are in {folder}")
        print(error, file=sys.stderr, flush=True)
        (self.run / "exit.json").write_text(json.dumps({"code": error.code, "reason": str(error)}))
        if "SPARSETRON_EXIT_FILE" in os.environ:
            Path(os.environ["SPARSETRON_EXIT_FILE"]).write_text(str(error.code))
        self._tell("verdict", [who[r] for r in found if r not in answers])

    def _end_the_silent(self, silent: list[dict[str, Any]]) -> None:
        """Those on this machine that cannot end themselves."""
        for process in silent:
            if process["host"] == socket.gethostname():
                os.kill(process["pid"], signal.SIGKILL)

    def _tell(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _told(self, key: str) -> Any:
        return json.loads(self.store.get(key))


def suspects(answers: dict[int, dict[str, Any]], world: int) -> list[int]:
    """Ranks that hold the others up: who is silent, or else waits for nobody, or else is behind, or else all."""
    silent = [r for r in range(world) if r not in answers]
    busy = [r for r, a in answers.items() if not a["waits"]]
    last = max((a["step"] for a in answers.values()), default=0)
    behind = [r for r, a in answers.items() if a["step"] < last]
    return silent or busy or behind or list(answers)


def describe(rank: int, who: dict[str, Any], answer: Optional[dict[str, Any]]) -> str:
    """One of them, in words."""
    name = f"rank {rank} (host {who['host']}, pid {who['pid']})"
    if answer is None:
        return f"{name} does not answer: it is stopped, or holds the interpreter"
    wait = ", where it waits for others or for its device" if answer["waits"] else ""
    return f"{name} is in step {answer['step']} ({answer['phase']}) at {answer['at']}{wait}"


def place(frame: FrameType) -> str:
    """The innermost line of the project's own code, or of all code."""
    own = (f for f in chain(frame) if Path(f.f_code.co_filename).is_relative_to(ROOT) and "site-packages" not in str(f))
    f = next(own, frame)
    path = Path(f.f_code.co_filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{shown}:{f.f_lineno} in {f.f_code.co_name}"


def waits_for_others(frame: FrameType) -> bool:
    """Whether a thread is inside a collective."""
    return any("torch/distributed/" in f.f_code.co_filename for f in chain(frame))


def unfinished(device: torch.device) -> bool:
    """Whether a GPU has work that is not done. Does not wait for it."""
    return device.type == "cuda" and not torch.cuda.current_stream(device).query()


def chain(frame: Optional[FrameType]) -> list[FrameType]:
    """A frame and those that called it, innermost first."""
    out = []
    while frame is not None:
        out.append(frame)
        frame = frame.f_back
    return out


def _store(world: int) -> dist.Store:
    """A connection of its own: one that waits for an answer in another thread would hold this one up."""
    if world == 1:
        return dist.HashStore()
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=3 * ROLL))
    return dist.PrefixStore("watchdog", client)
