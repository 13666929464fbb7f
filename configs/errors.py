"""What a user can get wrong, each with its exit code and one line of text. Standard library only.

Exit codes: 0 done or stopped by the user, 64 configuration, 65 data, 66 checkpoint, 70 internal error, 71 hang,
75 preempted or out of time (run again), 76 diverged.
"""

import sys
from collections.abc import Callable

PREEMPTED = 75
FINAL = {0, 64, 65, 66, 75, 76}  # another start would end the same, or was not wanted


class RunError(Exception):
    """An error the user can act on: `error: <what> <where>: <why>; <what to do>`."""

    code = 70
    alone = False  # raised on one rank of several, where the others cannot know

    def __init__(self, what: str, where: object, why: str, fix: str):
        super().__init__(what, str(where), why, fix)

    def __str__(self) -> str:
        what, where, why, fix = self.args
        return " ".join(f"error: {what} {where}: {why}; {fix}".split())


class ConfigError(RunError):
    """An option that is unknown, mistyped, out of range or at odds with another one."""

    code = 64


class DataError(RunError):
    """A corpus, shard or manifest that is missing, damaged or of the wrong kind."""

    code = 65


class CheckpointError(RunError):
    """A run directory or checkpoint that is missing, damaged or of another model."""

    code = 66


class OutOfMemory(RunError):
    """A rank has no memory left, of its device or of its host."""

    alone = True


class HangError(RunError):
    """A process that does not go on."""

    code = 71


class DivergedError(RunError):
    """The loss or the gradient is no longer a number."""

    code = 76


def exit_code(work: Callable[[], object]) -> int:
    """Of a command that does `work`: an error that the user can act on is its line on stderr and its code."""
    try:
        work()
    except RunError as e:
        print(e, file=sys.stderr, flush=True)
        return e.code
    return 0
