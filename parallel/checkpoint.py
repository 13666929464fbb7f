"""Published checkpoints (parallel/saver.py makes them): which one a run continues from, and what is read of it.

Every hash is verified before anything is read. From a damaged one the run goes back, loudly, to the one before; it
stays beside the others, under a name that is no checkpoint's, so that its step can be saved again.
"""

import hashlib
import json
import sys
from itertools import count
from pathlib import Path
from typing import Any, Optional

from configs.errors import CheckpointError
from configs.schema import Attention, Model, Resume
from parallel.comm import agree, host_gather, together
from parallel.engine import Engine
from parallel.mesh import Mesh

VERSION = 4
PIECES = "pieces"
# By group, the options that make a model, of which an export names each.
OPTIONS = {"model": set(Model.__annotations__) - {"name"}, "attention": set(Attention.__annotations__) - {"backend"}}


def find(
    run: Path, mesh: Mesh, resume: Resume, state: dict[str, Any], before: Optional[int] = None
) -> Optional[tuple[str, dict[str, Any]]]:
    """The newest checkpoint of `run` whose every file is whole, with its state; None for a new run. Collective.

    Those of the step `before` and later ones, if it is given, are of a way that the run leaves: they are set aside.

    Raises CheckpointError when `resume` forbids what is there, or when the checkpoint's model is not the one that
    `state` says this run has. Its layout may be another one.
    """
    if resume is Resume.never:
        if agree(mesh, lambda: run.exists() and any(run.iterdir())):
            raise CheckpointError("run.dir", run, "exists and resume=never", "choose another run.dir or resume=auto")
        return None
    paths, damaged = agree(mesh, lambda: published(run)), []
    later = [p for p in paths if before is not None and int(Path(p).name.removeprefix("step-")) >= before]
    for path in paths[len(later) :]:
        _check_version(path, agree(mesh, lambda path=path: _version(path)))
        problems = [p for p in host_gather(_damage(path, mesh.rank, mesh.world), mesh) if p]
        if problems:
            _say(mesh, f"warning: checkpoint {path}: {problems[0]}; going back to the one before")
            damaged.append(path)
            continue
        found = agree(mesh, lambda path=path: json.loads(Path(path, "MANIFEST.json").read_text())["state"])
        _check_same(path, found, state)
        for why, which in (("damaged", damaged), ("abandoned", later)):
            together(lambda why=why, which=which: _set_aside(which if mesh.rank == 0 else [], why), mesh)
        return path, found
    if resume is Resume.must:
        raise CheckpointError(
            "run.dir", run, "has no whole checkpoint and resume=must", "give resume=auto to start anew"
        )
    if agree(mesh, lambda: bool(published(run))):
        raise CheckpointError("run.dir", run, "every checkpoint is damaged", "restore one, or choose another run.dir")
    return None


def load(path: str, engine: Engine) -> None:
    """Read the weights and the optimizer state from a checkpoint that `find` returned. Collective."""
    engine.load(Path(path, PIECES))


def newest(run: Path) -> tuple[str, dict[str, Any]]:
    """Path and state of the newest whole checkpoint, by one process alone. Raises CheckpointError if there is none."""
    for path in published(run):
        _check_version(path, _version(path))
        why = _damage(path)
        if why is None:
            return path, json.loads(Path(path, "MANIFEST.json").read_text())["state"]
        print(f"warning: checkpoint {path}: {why}; going back to the one before", file=sys.stderr, flush=True)
    raise CheckpointError("run", run, "has no whole checkpoint", "give a directory that train.py has made")


def check_model(folder: Path, mesh: Mesh, state: dict[str, Any]) -> None:
    """Whether a run can begin with the weights of an exported model. Collective.

    Raises CheckpointError if it is damaged, or of another model than `state` says this run has.
    """

    def look() -> None:
        content = exported(folder, verify=mesh.rank == 0)
        found = {f"{g}.{k}": v for g in OPTIONS for k, v in content[g].items()}
        _check_same(str(folder), {"identity": found}, state)

    together(look, mesh)


def exported(folder: Path, verify: bool = True) -> dict[str, Any]:
    """config.json of a model that launch.export wrote, and whose weights are whole, if they are to be verified.

    Raises CheckpointError if it is damaged, or has not the options of this version. One from before there were tied
    embeddings says so: it has none.
    """
    try:
        content = json.loads((folder / "config.json").read_text())
        content["model"].setdefault("tie_embeddings", False)
        differ = {f"{g}.{k}" for g, names in OPTIONS.items() for k in names ^ set(content[g])}
        differ |= {"seq_len", "sha256"} - set(content)
        whole = differ or not verify or sha256(folder / "model.safetensors") == content["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        why = f"not readable ({type(e).__name__} {e})"
        raise CheckpointError("model", folder, why, "give a directory that launch.export has made") from e
    if differ:
        why = f"config.json and this version differ in which options there are: {', '.join(sorted(differ))}"
        raise CheckpointError("model", folder, why, "export it again, from its run and with this version")
    if not whole:
        raise CheckpointError("model", folder, "model.safetensors does not match its hash", "export it again")
    return content


def group(identity: dict[str, Any], name: str) -> dict[str, Any]:
    """The options of one group in an identity, which has them by their whole names."""
    return {key.removeprefix(f"{name}."): v for key, v in identity.items() if key.startswith(f"{name}.")}


def published(run: Path) -> list[str]:
    """Paths of the published checkpoints, newest first."""
    names = (p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdecimal())
    return sorted(map(str, names), reverse=True)


def _set_aside(paths: list[str], why: str) -> None:
    """Make room for these steps to be saved again; the files stay, for a look or for a disk that comes back."""
    for path in map(Path, paths):
        aside = next(p for n in count(1) if not (p := path.with_name(f"{why}-{n}-{path.name}")).exists())
        try:
            path.rename(aside)
        except OSError as e:
            raise CheckpointError("checkpoint", path, f"cannot be renamed ({e})", f"name it {aside.name}") from e


def _version(path: str) -> Optional[int]:
    """Format of a checkpoint; None if its manifest cannot tell."""
    try:
        return int(json.loads(Path(path, "MANIFEST.json").read_text())["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_version(path: str, version: Optional[int]) -> None:
    if version not in (None, VERSION):
        why = f"has format {version}, this version reads {VERSION}"
        raise CheckpointError("checkpoint", path, why, "continue with the version that made it, or choose another run")


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """With the hash of what it says: one flipped bit in a number would still be a number."""
    return {**manifest, "sha256": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return _digest(f)


def _digest(f: Any) -> str:
    digest = hashlib.sha256()
    while chunk := f.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _damage(path: str, rank: int = 0, world: int = 1) -> Optional[str]:
    """What a rank finds wrong with its share of a checkpoint, or None."""
    folder = Path(path)
    try:
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if sealed({k: v for k, v in manifest.items() if k != "sha256"}) != manifest:
            return "MANIFEST.json does not match its hash"
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        if extra := there - {*manifest["files"], "MANIFEST.json"}:
            return f"{min(extra)} is not in the manifest"
        share = sorted(manifest["files"].items())[rank::world]
        for name, entry in share:
            if (folder / name).stat().st_size != entry["bytes"]:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(folder / name) != entry["sha256"]:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{type(e).__name__} {e}"
    return None


def _check_same(path: str, found: dict[str, Any], state: dict[str, Any]) -> None:
    theirs, ours = found["identity"], state["identity"]
    differ = [k for k in sorted({**theirs, **ours}) if theirs.get(k) != ours.get(k)]
    if differ:
        some = [f"{k}={theirs.get(k)}, this run has {ours.get(k)}" for k in differ[:3]]
        why = f"was made by another model: {' and '.join(some)}" + (" and more" if len(differ) > 3 else "")
        fix = f"give {' '.join(f'{k}={theirs.get(k)}' for k in differ)}, or choose another"
        raise CheckpointError("checkpoint", path, why, fix)


def _say(mesh: Mesh, line: str) -> None:
    if mesh.rank == 0:
        print(line, file=sys.stderr, flush=True)
