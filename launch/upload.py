"""python -m launch.upload RUN...: send runs to W&B that were made without it, or while its server was away.

What W&B has already is not sent again: the command can be repeated, also while a run goes on without W&B. RUN is a run
directory, or one that holds several. Exit codes: 0; 64 for a bad option, not logged in, or a key that the server
refuses; 66 for what is no run; 75 for a server that does not answer (try again).
"""

import sys
from pathlib import Path
from typing import Optional

from configs.errors import ConfigError, exit_code
from configs.options import Options, filled, number
from configs.schema import WandbMode
from launch import runs, tracking


def upload(directory: Path, timeout: float) -> str:
    """Send what W&B lacks of a run. Returns a line that says what. Raises RunError."""
    runs.read(directory)
    try:
        run = tracking.start(directory, WandbMode.online, timeout)
        had = run.starting_step
        sent = tracking.send(tracking.Lines(directory / "metrics.jsonl", skip=had), run)
        where = run.url
        run.finish(exit_code=0)
    except Exception as e:  # W&B has many
        fix = "give the same command again: what has arrived is not sent twice"
        raise tracking.failure(e, f"run {directory}", fix) from e
    return f"{directory}: {sent} lines sent, {had} were there: {where}"


def upload_all(directories: list[str], timeout: float) -> None:
    """Each run at or below `directories`."""
    if not tracking.has_key():
        raise ConfigError("W&B", "login", "no key for the server", "run `wandb login`, or set WANDB_API_KEY")
    for path in [path for directory in directories for path in runs.find(directory)]:
        print(upload(path, timeout), flush=True)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = Options("python -m launch.upload", __doc__.split(": ", 1)[1])
    parser.add_argument("runs", nargs="+", type=filled, metavar="RUN", help="run directory, or one that holds several")
    parser.add_argument("--timeout", type=number(float, 1), default=60.0, help="seconds to wait for the server")

    def work() -> None:
        args = parser.parse_args(argv)
        upload_all(args.runs, args.timeout)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
