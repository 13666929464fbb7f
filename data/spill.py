"""Tokenized documents on disk on their way to shards: runs, each in the order of the documents' hashes.

The hash of a document's text decides all about it: whether it is held out, in which shard it is and where. So the order
in which documents arrive does not matter, equal ones meet, and a shard is one stretch of every run. A run counts once
its last file is there, and that says how far the input was read: a preparation that was interrupted goes on from it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

RUN = 32 << 20  # bytes of tokens of a run, about: what is lost by an interruption, and what is held in memory
SPACE = 1 << 64  # hashes are below this, in their first eight bytes


@dataclass
class Encoded:
    """Tokenized documents, one after the other."""

    keys: np.ndarray  # uint64 [documents, 2]: the hash of the text
    lengths: np.ndarray  # int64 [documents]: tokens of each, with its end-of-text token
    tokens: np.ndarray  # uint16 or uint32


def key(text: bytes, seed: int) -> bytes:
    """The hash of a document, 16 bytes."""
    digest = hashlib.sha256(b"%d " % seed)
    digest.update(text)
    return digest.digest()[:16]


class Runs:
    """The runs of a directory. Raises OSError."""

    def __init__(self, directory: Path, dtype: str):
        self.directory, self.dtype = directory, np.dtype(dtype)
        self.count, self.state = 0, {}  # what came with the last run
        while self._path(self.count, "json").exists():
            self.state = json.loads(self._path(self.count, "json").read_text())
            self.count += 1

    def write(self, parts: list[Encoded], state: dict[str, Any]) -> None:
        """Add one run; `state` is JSON that is kept with it."""
        keys = np.concatenate([p.keys for p in parts])
        ends = np.concatenate([p.lengths for p in parts]).cumsum()
        tokens = np.concatenate([p.tokens for p in parts])
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        starts = np.append(0, ends[:-1])[order]
        table = np.stack((keys[order, 0], keys[order, 1], (ends[order] - starts).cumsum().astype(np.uint64)))
        pieces = (tokens[a:b] for a, b in zip(starts.tolist(), ends[order].tolist()))
        _save(self._path(self.count, "tokens"), pieces)
        _save(self._path(self.count, "table"), [np.ascontiguousarray(table)])
        _save(self._path(self.count, "json"), [json.dumps(state).encode()])
        self.count, self.state = self.count + 1, state

    def tokens(self, low: int, high: int) -> int:
        """How many tokens the documents have whose hashes are in [low, high)."""
        return sum(int(table[2, -1]) - before for _, table, before in self._stretches(low, high))

    @property
    def documents(self) -> int:
        """How many there are."""
        return sum(table.shape[1] for _, table, _ in self._stretches(0, SPACE))

    def read(self, low: int, high: int, unique: bool) -> list[np.ndarray]:
        """The documents with hashes in [low, high), in the order of these; one of each that are equal if `unique`."""
        keys, documents = [np.empty((2, 0), np.uint64)], []
        for run, table, before in self._stretches(low, high):
            bounds = [0, *(table[2] - np.uint64(before)).tolist()]
            offset = before * self.dtype.itemsize
            tokens = np.fromfile(self._path(run, "tokens"), self.dtype, bounds[-1], offset=offset)
            documents += [tokens[a:b] for a, b in pairwise(bounds)]
            keys.append(np.array(table[:2]))
        high_half, low_half = np.concatenate(keys, axis=1)
        order = np.lexsort((low_half, high_half))
        if unique and len(order):
            same = (np.diff(high_half[order]) == 0) & (np.diff(low_half[order]) == 0)
            order = order[np.append(True, ~same)]
        return [documents[i] for i in order.tolist()]

    def _stretches(self, low: int, high: int) -> Iterator[tuple[int, np.ndarray, int]]:
        """(run, columns of its table, tokens before them) of the runs that have hashes in [low, high)."""
        for run in range(self.count):
            table = np.memmap(self._path(run, "table"), np.uint64, "r").reshape(3, -1)
            first, last = (
                table.shape[1] if edge == SPACE else int(table[0].searchsorted(np.uint64(edge))) for edge in (low, high)
            )
            if first < last:
                yield run, table[:, first:last], int(table[2, first - 1]) if first else 0

    def _path(self, run: int, kind: str) -> Path:
        return self.directory / f"run-{run:06d}.{kind}"


def _save(path: Path, pieces: Iterable[Any]) -> None:
    """Write a file; it appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        f.writelines(pieces)
        f.flush()
        os.fsync(f.fileno())
    os.rename(temporary, path)
