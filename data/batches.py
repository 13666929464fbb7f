"""Which batch a step of a run was trained on: `batches.jsonl` of the run, and what it says of a step.

A line is written at each start and wherever batches are passed over, with all that the order follows from; between
lines every step takes the next batch. A later line counts before an earlier one, as a run that went back repeats steps.
"""

import json
import os
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.schema import LongDocuments, OnBadShard, scheme
from data.loader import Loader

FILE = "batches.jsonl"
TOKENS = 24  # of a document, whose text is shown


@dataclass(frozen=True)
class Part:
    """What a row has of one document."""

    shard: str
    begin: int  # in the shard's stream of tokens
    ids: list[int]


def append(run: Path, step: int, loader: Loader) -> None:
    """Say where the data stands after `step` steps."""
    batch, row = loader.coming
    paths = [p if scheme(p) else os.path.abspath(p) for p in loader.paths]
    place = {"step": step, "batch": batch, "row": row, "paths": paths, "global_batch": loader.global_batch}
    with open(run / FILE, "a") as f:
        f.write(json.dumps({**place, "data": loader.state_dict()}) + "\n")


def find(run: Path, step: int) -> tuple[Loader, int, int]:
    """A loader in the order of a run, and the number and the first row of the batch of one of its steps.

    Raises DataError if the run has no such step, or its data is gone or another.
    """
    try:
        lines = [json.loads(line) for line in (run / FILE).read_text().splitlines()]
    except (OSError, ValueError) as e:
        raise DataError("run", run, f"has no readable {FILE} ({e})", "give a directory that train.py has made") from e
    last = next((line for line in reversed(lines) if line["step"] < step), None)
    if last is None:
        raise DataError("step", step, f"is before the first of {run}", "give a later one")
    if not last["paths"]:
        raise DataError("run", run, "trained on random tokens", "give a run on prepared data")
    after, size, data = step - 1 - last["step"], last["global_batch"], last["data"]
    mix = dict(zip(last["paths"], data["weights"]))
    options = {"long_documents": LongDocuments(data["long_documents"]), "on_bad_shard": OnBadShard.skip}
    loader = Loader(mix, data["split"], data["seq_len"], size, size, data["seed"], **options)
    loader.load_state_dict(data)
    return loader, last["batch"] + after, last["row"] + after * size


def parts(loader: Loader, row: int) -> list[Part]:
    """What a row consists of. Raises DataError for a damaged shard."""
    out = []
    for shard, begin, end in loader.origin(row):
        edges = [begin, *shard.starts_within(begin, end - 1).tolist(), end]
        out += [Part(shard.name, a, shard.read(a, b).tolist()) for a, b in pairwise(edges)]
    return out


def show(run: Path, step: int) -> None:
    """Print the rows of a step: their documents with shard, place, first tokens and the beginning of the text."""
    loader, number, first = find(run, step)
    encoding = _encoding(loader)
    took = "took" if step <= _last(run) else "is not logged; it takes, unless the run goes back,"
    print(f"{run}: step {step} {took} batch {number}, rows {first} to {first + loader.global_batch - 1}")
    for row in range(first, first + loader.global_batch):
        try:
            found = parts(loader, row)
        except DataError as e:
            print(f"row {row}: empty in training, if it was skipped: {e}")
            continue
        print(f"row {row}: {sum(len(p.ids) for p in found)} tokens of {len(found)} documents")
        for p in found:
            text = json.dumps(encoding.decode(p.ids[:TOKENS]), ensure_ascii=False)
            ids = " ".join(map(str, p.ids[:8]))
            print(f"  {p.shard} [{p.begin}:{p.begin + len(p.ids)}]  ids {ids}{' ...' * (len(p.ids) > 8)}  {text}")


def _last(run: Path) -> int:
    """The last step that is logged."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("\n")), default=0)


def _encoding(loader: Loader) -> Any:
    """The tokenizer of the data, wherever that lies."""
    from data.tokenizer import load  # late: a run, which writes batches.jsonl, does not need it

    known = loader.manifest.tokenizer
    if not known["ranks"]:
        return load(known["name"], None)
    with tempfile.NamedTemporaryFile() as f:
        f.write(loader.sources[0].store.read(known["ranks"]))
        f.flush()
        return load(known["name"], f.name)
