"""Run directories, read back: what was configured, where it ran, what it logged."""

import itertools
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Optional

import yaml
from omegaconf import OmegaConf

from configs.errors import CheckpointError
from configs.schema import Config

PACKAGES = ("torch", "triton", "deepspeed")  # whose versions a run notes
HEALTH = "sparsity/"  # begins sparsity/MEASURE/LAYER, the keys of lines about the sparsity of attention


@dataclass(frozen=True)
class Measured:
    """One run directory."""

    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]  # lines of training steps, in order, the last one for each step
    validation: list[dict[str, Any]]
    health: list[dict[str, Any]]  # lines about the sparsity of attention

    @property
    def is_full(self) -> bool:
        return self.config["attention"]["kind"] == "full"

    @property
    def context(self) -> int:
        """Tokens of a row."""
        return self.config["data"]["seq_len"]

    @property
    def place(self) -> str:
        """What it was measured on."""
        return f"{self.environment['world']} x {self.environment['device']}"

    @property
    def timed(self) -> int:
        """Logged steps of the later half, when compilation and caches have settled."""
        return len(self.steps) - len(self.steps) // 2

    def settled(self, key: str) -> Optional[float]:
        """Median over the steps that are `timed`."""
        values = [s[key] for s in self.steps[-self.timed :] if s.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def loss(self) -> float:
        """Mean training loss of the last ten logged steps."""
        return statistics.fmean(s["loss"] for s in self.steps[-10:])

    @property
    def validation_loss(self) -> Optional[float]:
        return self.validation[-1]["val_loss"] if self.validation else None

    @property
    def memory(self) -> float:
        """GiB at the most, of rank 0."""
        return max(s["mem_gib"] for s in self.steps)

    def sparsity(self) -> dict[str, list[tuple[int, list[float]]]]:
        """Of each measure: tokens seen, and its value in each layer, over the run."""
        out: dict[str, list[tuple[int, list[float]]]] = {}
        for line in self.health:
            keys = sorted(key for key in line if key.startswith(HEALTH))
            for measure, group in itertools.groupby(keys, lambda key: key.split("/")[1]):
                out.setdefault(measure, []).append((line["tokens"], [line[key] for key in group]))
        return out

    def seconds(self) -> list[float]:
        """Training time at each logged step; evaluation, saving and pauses between restarts are not in it."""
        before = [0, *(s["step"] for s in self.steps)]
        spans = [s["step_s"] * (s["step"] - b) for s, b in zip(self.steps, before)]
        return list(itertools.accumulate(spans))


PACE = {
    "parallel": ("tp", "pp", "zero", "sequence", "recompute", "compile"),
    "train": ("global_batch", "micro_batch", "precision"),
}


def pace(config: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """What the speed of a run depends on besides its model, attention and context, by names to show."""
    options = {f"{part}.{key}": config[part][key] for part, keys in PACE.items() for key in keys}
    options["deterministic"] = config["deterministic"]
    versions = {package: environment.get(package) for package in PACKAGES}
    return {"device": environment["device"], "processes": environment["world"], **versions, **options}


def find(directory: str) -> list[Path]:
    """The run directories at or below one (a sweep's), by name. Raises CheckpointError if there is none."""
    path = Path(directory)
    if (path / "config.yaml").exists():
        return [path]
    found = sorted(p.parent for p in path.glob("**/metrics.jsonl"))
    if not found:
        why = "holds no run" if path.exists() else "does not exist"
        raise CheckpointError("run", path, why, "give directories that train.py has made")
    return found


def read(path: Path) -> Measured:
    """A run directory. Raises CheckpointError if it is none."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
        environment = json.loads((path / "environment.json").read_text())
        lines = _lines((path / "metrics.jsonl").read_text())
        kinds = (lambda m: "loss" in m, lambda m: "val_loss" in m, lambda m: any(key.startswith(HEALTH) for key in m))
        by_kind = [{m["step"]: m for m in lines if is_kind(m)} for is_kind in kinds]  # a resumed run repeats steps
    except (OSError, ValueError, KeyError, yaml.YAMLError) as e:
        why = f"not readable ({type(e).__name__} {e})"
        raise CheckpointError("run", path, why, "give directories that train.py has made") from e
    if not by_kind[0]:
        raise CheckpointError("run", path, "has no logged step yet", "wait for its first step")
    return Measured(path.name, _whole(config), environment, *([found[k] for k in sorted(found)] for found in by_kind))


def _whole(config: dict[str, Any]) -> dict[str, Any]:
    """For what the version that made a run had no option, the run did as that option's default says."""
    parts = {part.name: OmegaConf.structured(part.type) for part in fields(Config) if is_dataclass(part.type)}
    today = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Config), parts), enum_to_str=True)
    return OmegaConf.to_container(OmegaConf.merge(today, config))


def _lines(text: str) -> list[dict[str, Any]]:
    """Objects of a JSON lines file; a half line at the end, where a run was killed, is left out."""
    lines = text.splitlines()
    if lines and not text.endswith("\n"):
        lines.pop()
    return [json.loads(line) for line in lines]


def differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted key: its value in each configuration ("-" where it is absent), for keys that differ."""
    return {key: values for key, values in flat_rows(configs).items() if any(v != values[0] for v in values)}


def flat_rows(nodes: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Dotted key: its value in each node, "-" where it is absent."""
    flat = [dict(_leaves(node)) for node in nodes]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    return {key: [leaves.get(key, "-") for leaves in flat] for key in keys}


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
