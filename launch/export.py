"""python -m launch.export RUN DIR: the newest checkpoint as one model, whatever layout it was trained on.

DIR gets model.safetensors (whole fp32 weights by the names of parallel/transformer.py), config.json (options of the
model and its attention by the names of configs/schema.py, tokenizer, where it comes from, hash) and tokenizer.tiktoken.
A tied weight is there once, as the embedding's. A run starts from it with train.start_from=DIR.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from safetensors.torch import load_file, save_file

from configs.errors import CheckpointError, DataError, exit_code
from configs.options import Options, place
from configs.schema import Config, Data, sources
from data import tokenizer
from data.source import manifest
from data.store import Limits, Store, open_store
from launch.compose import from_text
from parallel import checkpoint, tied
from parallel.mesh import Group, Mesh
from parallel.pieces import Reader
from parallel.transformer import Transformer


def export(run: Path, output: Path) -> str:
    """Write `output`, which must not exist; it appears whole or not at all. Returns the checkpoint that it came from.

    Raises CheckpointError, DataError.
    """
    if output.exists():
        raise CheckpointError("output", output, "exists", "choose another directory")
    cfg = _config(run)
    if cfg.data.random:
        why = f"trained on random tokens (data.random={cfg.data.random}), which have no tokenizer"
        raise DataError("run", run, why, "export a run on prepared data")
    path, state = checkpoint.newest(run)
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(cfg, path, state, temporary)
        os.rename(temporary, output)
    except OSError as e:
        why = f"cannot be written ({e.strerror or e})"
        raise CheckpointError("output", output, why, "give it space and permission, or choose another") from e
    finally:  # there is none any more if all went well
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def _write(cfg: Config, path: str, state: dict[str, Any], temporary: Path) -> None:
    """The model of a checkpoint with this state, into a new directory."""
    store = _store(cfg.data)
    known = manifest(store).tokenizer
    temporary.mkdir(parents=True)
    reader = Reader(Path(path, checkpoint.PIECES))
    weights = temporary / "model.safetensors"
    save_file({name: reader.whole(name).contiguous() for name in sorted(reader.places)}, weights)
    weights.chmod(0o640)  # it would be for its user alone
    content = {group: checkpoint.group(state["identity"], group) for group in checkpoint.OPTIONS}
    content |= {"tokenizer": _tokenizer(store, known, temporary), "seq_len": cfg.data.seq_len, "checkpoint": str(path)}
    content |= {"step": state["step"], "tokens": state["tokens"], "sha256": checkpoint.sha256(weights)}
    (temporary / "config.json").write_text(json.dumps(content, indent=1) + "\n")


def load(folder: Path) -> Transformer:
    """The exported model on this host, in fp32: call it with (tokens [n], Documents), it gives logits [n, vocab].

    Raises CheckpointError for what is damaged or of another version.
    """
    content = checkpoint.exported(folder)
    parts = {group: content[group] for group in checkpoint.OPTIONS}
    parts["model"] = {"name": folder.name, **parts["model"]}
    rest = {"data": {"path": "-", "seq_len": content["seq_len"]}, "run": {"dir": "-"}}
    alone = Group(None, 0, 1)
    mesh = Mesh(0, 1, torch.device("cpu"), alone, alone, alone, alone, control=None)
    model = Transformer(from_text(yaml.safe_dump({**parts, **rest})), content["model"]["vocab_size"], mesh)
    weights = load_file(folder / "model.safetensors")
    if content["model"]["tie_embeddings"]:  # which are there once
        weights[f"{len(model) - 1}.output.weight"] = weights[tied.EMBEDDING]
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:  # config.json was written by hand
        why = f"the weights are not those of its config.json ({str(e).splitlines()[1].strip()[:150]})"
        raise CheckpointError("model", folder, why, "export it again") from e
    return model


def _config(run: Path) -> Config:
    try:
        return from_text((run / "config.yaml").read_text())
    except OSError as e:
        raise CheckpointError("run", run, f"not readable ({e})", "give a directory that train.py has made") from e


def _store(data: Data) -> Store:
    """Where the run's data lies, the first of several: all have one tokenizer."""
    return open_store(next(iter(sources(data))), Limits(data.cache_dir, int(data.cache_gib * 2**30), data.timeout))


def _tokenizer(store: Store, known: dict[str, Any], output: Path) -> dict[str, Any]:
    """Write the ranks of the tokenizer that a manifest names; returns what else there is to know of it."""
    file = output / "tokenizer.tiktoken"
    if known["ranks"]:
        file.write_bytes(store.read(known["ranks"]))
    else:
        tokenizer.save(tokenizer.named(known["name"])._mergeable_ranks, file)
    encoding = tokenizer.load(known["name"], str(file) if known["ranks"] else None)
    return {**known, "ranks": file.name, "pattern": encoding._pat_str}


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = Options("python -m launch.export", __doc__.split(": ", 1)[1])
    parser.add_argument("run", type=place, metavar="RUN", help="run directory")
    parser.add_argument("output", type=place, metavar="DIR", help="new directory")
    os.umask(0o027)

    def work() -> None:
        args = parser.parse_args(argv)
        print(f"{args.output}: {export(args.run, args.output)}")

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
