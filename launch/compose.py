"""The configuration of a run: Hydra composes it once, on rank 0, and everybody reads the resolved text."""

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from configs.errors import ConfigError
from configs.rules import check
from configs.schema import Config, Kind, Twin

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MULTIRUN = {"-m", "--multirun"}
OF_HYDRA = ("hydra.sweeper.", "hydra.searchpath", "hydra.verbose")  # what of Hydra itself may be set


Rules = Callable[[Config, int], None]


def compose(world: int, rules: Rules = check) -> Optional[str]:
    """The run that the command line asks for, checked for `world` processes, as YAML; None if Hydra only printed.

    Raises ConfigError for whatever is wrong with it.
    """
    if is_multirun():
        why, fix = "several processes start one run", "give -m to launch/local.sh, python train.py or launch.submit"
        raise ConfigError("config", "--multirun", why, fix)
    _check_overrides(sys.argv[1:])
    texts: list[str] = []
    _call_hydra(lambda raw: texts.append(_resolved(raw, world, rules)))
    return texts[0] if texts else None


def is_multirun() -> bool:
    """Whether the command line asks for several runs."""
    return bool(MULTIRUN & set(sys.argv[1:]))


def compose_all(world: int) -> list[tuple[list[str], str]]:
    """The runs that a multirun command line asks for, in Hydra's order: overrides of each, and what `compose` gives."""
    _check_overrides(sys.argv[1:])
    jobs: list[tuple[list[str], str]] = []
    program, *typed = sys.argv
    typed = [arg for arg in typed if arg not in MULTIRUN]
    first = next((i for i, arg in enumerate(typed) if "=" in arg), len(typed))
    with tempfile.TemporaryDirectory() as scratch:  # Hydra makes folders for its jobs
        # Hydra's parser wants overrides in one piece.
        sys.argv = [program, "--multirun", *typed[:first], f"hydra.sweep.dir={scratch}", *typed[first:]]
        try:
            _call_hydra(lambda raw: jobs.append((list(HydraConfig.get().overrides.task), _resolved(raw, world))))
        finally:
            sys.argv = [program, *typed]
    if not jobs and not any(arg.startswith("-") for arg in typed):  # nor was Hydra asked to show something
        raise ConfigError("config", "--multirun", "an option has no values, so there is no run", "give it some")
    return jobs


def _call_hydra(task: Callable[[DictConfig], None]) -> None:
    """Let Hydra read the command line and call `task` with each run. Raises ConfigError."""
    ConfigStore.instance().store(name="schema", node=Config)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, instead of printing a page and leaving with 1
    said = io.StringIO()
    try:
        with _explained(), contextlib.redirect_stderr(said):  # argparse writes its usage there before it leaves
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(task)()
    except SystemExit as e:
        if e.code:
            why = said.getvalue().strip().rsplit("error: ", 1)[-1]
            raise ConfigError("config", "command line", why, "options are KEY=VALUE; see python train.py --help") from e


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raises ConfigError for what Hydra and its parts raise."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as e:
        raise ConfigError("config", *_explain(e)) from e


def _check_overrides(typed: list[str]) -> None:
    """Those of a command line, before Hydra takes them. Raises ConfigError."""
    with _explained():
        for override in OverridesParser.create().parse_overrides([arg for arg in typed if re.match("[^-].*=|=", arg)]):
            _check_override(override)


def _check_override(override: Override) -> None:
    """What Hydra takes and should not. Raises ConfigError."""
    key, value = override.key_or_group, override.value()
    if not key:
        raise ConfigError("config", override.input_line, "names no option", "options are KEY=VALUE")
    if key.startswith(("hydra.", "hydra/")) and not key.startswith(OF_HYDRA):
        raise ConfigError("config", key, "has no use here", "give run.dir=DIR, where the run or the runs will lie")
    names = sorted(path.stem for path in (CONFIGS / key).glob("*.yaml"))
    values = value.list if isinstance(value, ChoiceSweep) else [] if override.is_sweep_override() else [value]
    if names and not override.is_delete() and not all(isinstance(value, str) for value in values):
        fix = f"give one of {', '.join(names)}, or leave it out"
        raise ConfigError("config", override.input_line, f"{key} is the name of a file in configs/{key}", fix)


def from_text(text: str) -> Config:
    """The typed configuration from YAML that `compose` wrote."""
    merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))
    cfg = OmegaConf.to_object(merged)
    assert isinstance(cfg, Config)
    return cfg


def _resolved(raw: DictConfig, world: int, rules: Rules = check) -> str:
    missing = sorted(OmegaConf.missing_keys(raw))
    if missing:
        raise ConfigError("config", missing[0], "has no value", f"give {missing[0]}=VALUE")
    if raw.twin is Twin.full:  # the run that the other options describe keeps its own directory
        raw.attention.kind, raw.run.dir = Kind.full, f"{raw.run.dir}-full"
    text = OmegaConf.to_yaml(raw, resolve=True)
    _check_secrets(text)
    rules(from_text(text), world)
    return text


def _check_secrets(text: str) -> None:
    """No configuration holds a secret: it is written into the run directory and into dashboards."""
    fix = "leave it in the environment, where the part that needs it looks"
    for name, value in os.environ.items():
        if re.search("KEY|TOKEN|SECRET|PASSWORD", name, re.IGNORECASE) and len(value) >= 8 and value in text:
            raise ConfigError("config", "command line", f"holds the value of ${name}", fix)
    if re.search(r"://[^/\s@]+:[^/\s@]+@", text):
        raise ConfigError("config", "command line", "holds an address with a password in it", fix)


def _explain(error: Any) -> tuple[str, str, str]:
    """Where, why and what to do, from the messages of Hydra and OmegaConf, which say it over several lines."""
    while isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = re.search(r"full_key: (\S+)", str(error))
    noise = r"(full_key|object_type|reference_type|See https|To append|Config search path|provider=)"
    why = " ".join(line for line in lines[:12] if not re.match(noise, line))
    where = key.group(1) if key else "command line"
    why = re.sub(r"Invalid value assigned: (\w+) is not a ListConfig, list or tuple", r"\1 given for a list [...]", why)
    if "LexerNoViableAltException" in why:
        why = why.replace("LexerNoViableAltException: ", "a quote or bracket that Hydra reads, in ")
        return where, why.rstrip(" ^"), """quote it for Hydra, inside the shell's quotes: 'run.dir="runs/my run"'"""
    return where, why.rstrip("."), "python train.py --cfg job shows every option, --help the groups"
