"""The W&B run: a mirror of metrics.jsonl, whose line k is row k of W&B's history.

W&B says how many rows it has, and gets the lines after them: however often a run is restarted, its server goes away or
it is uploaded later, there is one W&B run with each line once. A thread of its own reads the file and talks to W&B, so
that a server that is slow, down or silent costs a run nothing but a wait at its end.
"""

import itertools
import json
import logging
import netrc
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from configs.errors import PREEMPTED, ConfigError, RunError
from configs.schema import Config, Kind, WandbMode

PERIOD = 1.0  # seconds between two looks into metrics.jsonl


class Tracker:
    """Mirrors a run while it is made. `warn` is told, once, if that comes to an end."""

    def __init__(self, cfg: Config, warn: Callable[[str], None]):
        self.directory, self.wandb, self.warn = Path(cfg.run.dir), cfg.wandb, warn
        self.code = 0
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._mirror, name="wandb", daemon=True)
        if cfg.wandb.mode is not WandbMode.disabled:
            self.thread.start()

    def finish(self, code: int) -> None:
        """Hand over what is left, with the exit code of the run. Waits for W&B's own time limits and not longer."""
        self.code = code
        self.ending.set()
        if self.thread.is_alive():
            self.thread.join(2 * self.wandb.timeout + 5)  # its start and its end, if the run was that short

    def _mirror(self) -> None:
        try:
            run = start(self.directory, self.wandb.mode, self.wandb.timeout)
            lines = Lines(self.directory / "metrics.jsonl", skip=run.starting_step)
            while not self.ending.wait(PERIOD):
                send(lines, run)
            send(lines, run)
            run.finish(exit_code=self.code)
        except Exception as e:  # a dashboard never stops a run
            fix = f"metrics.jsonl has the numbers, python -m launch.upload {self.directory} sends them later"
            self.warn(f"warning: W&B is off: {reason(e)}; {fix}")


class ServerError(RunError):
    """W&B cannot be reached, or does not take what it is sent."""

    code = PREEMPTED


def failure(error: Exception, where: str, fix: str) -> RunError:
    """What W&B raised, as an error of a command: a key that is no key, or that the server refuses, will be refused
    again, and so will a project that it does not know; anything else may go well another time, with this `fix`."""
    if not re.search(r"returned error 40[134]\b|API key must", str(error)):  # W&B gives no other sign of which it is
        return ServerError("W&B", where, reason(error), fix)
    fix = "check the key (`wandb login --relogin`, or WANDB_API_KEY), and whose the project is (WANDB_ENTITY)"
    return ConfigError("W&B", where, reason(error), fix)


class Lines:
    """The whole lines of a JSON lines file that grows, each once, from the `skip`th on."""

    def __init__(self, path: Path, skip: int = 0):
        self.file = open(path, "rb")  # noqa: SIM115  read as long as the run lasts
        self.skipped = sum(1 for _ in itertools.islice(self, skip))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (line := self.file.readline()).endswith(b"\n"):
            yield json.loads(line)
        self.file.seek(-len(line), os.SEEK_CUR)


def send(lines: Lines, run: Any) -> int:
    """The lines that have come. Returns their number."""
    count = 0
    for line in lines:
        run.log(line)  # no step=: W&B counts; tokens are the axis
        count += 1
    return count


def start(directory: Path, wanted: WandbMode, timeout: float) -> Any:
    """The W&B run of a run directory, begun or continued. Raises what W&B raises, after `timeout` seconds at most."""
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        os.environ.setdefault(name, str(directory.absolute()))
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its telemetry waits 10 s for a silent server at exit
    logging.raiseExceptions = False  # its log on a full disk: each line would become a page on stderr
    import wandb  # takes a second, and is not needed where it is disabled

    config = yaml.safe_load((directory / "config.yaml").read_text())
    environment = json.loads((directory / "environment.json").read_text())
    online = wanted is WandbMode.online or (wanted is WandbMode.auto and has_key())
    run = wandb.init(
        id=identity(directory),
        dir=os.environ.get("WANDB_DIR", str(directory)),  # not set there: it would hold for the next run as well
        resume="allow" if online else None,
        project=config["wandb"]["project"],
        name=directory.name,
        config={**config, "environment": environment},
        mode="online" if online else "offline",
        settings=wandb.Settings(
            init_timeout=timeout, finish_timeout=timeout, console="off", x_disable_stats=not online
        ),
        **labels(directory, config, environment),
    )
    run.define_metric("tokens")
    run.define_metric("*", step_metric="tokens")
    return run


def labels(directory: Path, config: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """What runs are grouped and filtered by: a run and its twin are in one group."""
    kind, cut = config["attention"]["kind"], config["parallel"]
    group = config.get("experiment") or directory.name.removesuffix(f"-{Kind.full.value}")
    layout = f"tp{cut['tp']} pp{cut['pp']} zero{cut['zero']} of {environment['world']}"
    facts = {"commit": environment["commit"], "data": environment["data_fingerprint"]}
    tags = [f"{config['data']['seq_len']} tokens", layout, *(f"{k} {v[:12]}" for k, v in facts.items() if v)]
    return {"group": group, "job_type": kind, "tags": tags}


def identity(directory: Path, known: str = "") -> str:
    """The id of the W&B run of a directory, in its file wandb_id; of a new file `known` (a checkpoint's) if given."""
    path = directory / "wandb_id"
    if not path.exists():
        path.write_text(known or uuid.uuid4().hex[:12])
    return path.read_text()


def has_key() -> bool:
    """Whether the user is logged in, in the environment or by `wandb login`."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return bool(os.environ.get("WANDB_API_KEY")) or netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reason(error: Exception) -> str:
    """An error of W&B on one line."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error} (pip install wandb)"
    return " ".join(str(error).split())[:200]
