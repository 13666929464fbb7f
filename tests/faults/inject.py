"""train.py with faults in it. $FAULTS is KIND:RANK:STEP,...; each happens once: it leaves the file $ONCE/STEP.

Numbers that go wrong (nan) do so each time that the step is made, as they would by data.
"""

import ctypes
import errno
import os
import signal
import time
from pathlib import Path

import torch

import train

step_of_train = train.train_step


def step(run: train.Run) -> train.Step:
    """The next step, or what befalls this rank in it."""
    for kind, rank, at in (fault.split(":") for fault in os.environ["FAULTS"].split(",") if fault):
        if int(at) == run.step + 1 and int(rank) == run.mesh.rank:
            if kind == "nan":
                return _with_output_nan(run)
            if not Path(os.environ["ONCE"], at).exists():
                Path(os.environ["ONCE"], at).touch()
                KINDS[kind](run)
    return step_of_train(run)


def _with_output_nan(run: train.Run) -> train.Step:
    hook = run.engine.deepspeed.module.register_forward_hook(lambda module, args, out: out * torch.nan)
    try:
        return step_of_train(run)
    finally:
        hook.remove()


def _loader(run: train.Run) -> None:
    run.loader.next_step = lambda: time.sleep(600)


def _loop(run: train.Run) -> None:
    while True:
        pass


def _late(run: train.Run) -> None:
    train.train_step = lambda run: (time.sleep(0.2), step(run))[1]


def _slow_forward(run: train.Run) -> None:
    run.engine.deepspeed.module.register_forward_pre_hook(lambda module, args: time.sleep(0.1))  # two a step


def _reader(run: train.Run, fail) -> None:
    """From now on the thread that reads ahead does this instead."""
    run.loader.sources[0].shard = lambda index: fail()


def _broken_disk() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


KINDS = {
    "late": _late,
    "slow forward": _slow_forward,
    "reader hangs": lambda run: _reader(run, lambda: time.sleep(600)),
    "reader fails": lambda run: _reader(run, _broken_disk),
    "stop": lambda run: os.kill(os.getpid(), signal.SIGSTOP),
    "loader": _loader,
    "loop": _loop,
    "interpreter": lambda run: ctypes.PyDLL(None).sleep(600),  # nobody else gets the interpreter meanwhile
    "clock": lambda run: setattr(time, "time", lambda: 86400.0),  # long ago
    "ask": lambda run: os.kill(os.getpid(), signal.SIGTERM),
    "warn": lambda run: os.kill(os.getpid(), signal.SIGUSR1),
    "ask twice": lambda run: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)],
    "slow": lambda run: time.sleep(1.5),
}
train.train_step = step

if __name__ == "__main__":
    train.leave(train.main())
