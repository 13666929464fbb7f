"""One prepared data set as a loader reads it: rows by position, from shards that are fetched ahead and closed again."""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from configs.errors import DataError
from configs.schema import LongDocuments
from data.fit import Plan
from data.order import WINDOW, Rows, Window, name_key
from data.shards import Manifest, Shard, no_manifest, parse_manifest
from data.store import Limits, Local, Store, open_store

OPEN = 3 * WINDOW  # shards kept open: the window that is read, the one before, and the next


class Source:
    """A split of a data set. Raises DataError if there is none."""

    def __init__(self, path: str, split: str, long_documents: LongDocuments, verify: bool, limits: Limits):
        self.store: Store = open_store(path, limits)
        self.manifest = manifest(self.store)
        self.entries = self.manifest.splits.get(split, [])
        if not len(self.entries) or not self.entries.tokens.any():
            raise DataError("data", path, f"the split {split} is empty", "prepare more data, or another --val-fraction")
        self.split, self.long_documents, self.verify = split, long_documents, verify
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._faults: dict[int, DataError] = {}
        self._plans: dict[tuple[int, int], tuple[Window, Plan]] = {}  # by shard and length of rows
        self._fetching: dict[int, Future] = {}
        self._slots = threading.Semaphore(4)  # fetches at once

    def check(self) -> None:
        """Raises DataError if a shard of a directory is missing, or is not as long as the manifest says."""
        if not isinstance(self.store, Local):
            return
        names = (f"{self.store.where}/{path}" for path in self.entries.columns["path"])
        with ThreadPoolExecutor(32) as pool:
            sizes = np.fromiter(pool.map(_size, names, chunksize=256), np.int64, len(self.entries))
        wrong = np.flatnonzero(sizes != self.entries.columns["bytes"])
        if len(wrong):
            self.shard(int(wrong[0]))

    def rows(self, seq_len: int, seed: int, rest: Window | None = None) -> Rows:
        """The order of its rows."""
        key = name_key(seed, self.manifest.fingerprint, self.split)
        return Rows(self.entries.tokens, seq_len, key, rest, self.long_documents is LongDocuments.cut)

    def pieces(self, window: Window, row: int, seq_len: int) -> list[tuple[Shard, int, int]]:
        """What a row of a window consists of. Raises DataError for a damaged shard."""
        spans = self.spans(window, row, seq_len)
        return [(self.shard(i), begin, end) for span in spans for i, begin, end in window.pieces(*span)]

    def spans(self, window: Window, row: int, seq_len: int) -> list[tuple[int, int]]:
        """The (start, end) in its window of what a row consists of. Raises DataError for a damaged shard."""
        if self.long_documents is LongDocuments.carry:
            return [(row * seq_len, (row + 1) * seq_len)]
        for shard, start, end in window.stretches:
            rows = -(-(end - start) // seq_len)
            if row < rows:
                plan = self._plan(window, seq_len, shard, start, end)
                return [(start + a, start + b) for a, b in plan.spans(row)]
            row -= rows
        raise IndexError(row)

    def _plan(self, window: Window, seq_len: int, shard: int, start: int, end: int) -> Plan:
        """How the documents that a window has of a shard are fitted into rows."""
        known = self._plans.get((shard, seq_len))
        if known and known[0] == window:
            return known[1]
        starts, place = [], 0
        for index, begin, stop in window.pieces(start, end):
            inside = self.shard(index).starts_within(begin, stop - 1)
            starts += (np.array([place]), inside + (place - begin))
            place += stop - begin
        plan = Plan(np.concatenate(starts), place, seq_len)
        self._plans[shard, seq_len] = window, plan
        while len(self._plans) > OPEN:
            self._plans.pop(next(iter(self._plans)))
        return plan

    def shard(self, index: int) -> Shard:
        """The shard, open. A damaged one is not tried again."""
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        if index in self._faults:
            raise self._faults[index]
        try:
            self._open[index] = self._load(index)
        except DataError as e:
            self._faults[index] = e
            raise
        while len(self._open) > OPEN:
            self._open.popitem(last=False)
        return self._open[index]

    def _load(self, index: int) -> Shard:
        entry = self.entries[index]
        waiting = self._fetching.pop(index, None)
        path = waiting.result() if waiting else self.store.path(entry)
        name = f"{self.store.where}/{entry.path}"
        return Shard(path.parent, entry, self.manifest.dtype, self.verify, path.name, name)

    def ahead(self, windows: list[Window]) -> None:
        """Begin to fetch the shards of these windows, from a server."""
        if isinstance(self.store, Local):
            return
        for index in (i for window in windows for i in window.shards):
            if index not in self._open and index not in self._fetching and index not in self._faults:
                self._fetching[index] = background(partial(self.store.path, self.entries[index]), self._slots)


def manifest(store: Store) -> Manifest:
    """Of a data set. Raises DataError where it cannot be read."""
    try:
        return parse_manifest(store.read("manifest.json"), store.where)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise no_manifest(store.where) from e
    except OSError as e:
        where, why = f"{store.where}/manifest.json", f"not readable ({type(e).__name__} {e})"
        raise DataError("manifest", where, why, "make it readable") from e


def _size(path: str) -> int:
    """-1 where there is nothing."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def background(work: Callable[[], Any], turn: AbstractContextManager) -> Future:
    """Do the work on a thread when it has its turn. A process that ends does not wait for it, as a pool would."""
    future: Future = Future()

    def run() -> None:
        with turn:
            try:
                future.set_result(work())
            except BaseException as e:  # it is raised where the result is asked for
                future.set_exception(e)

    threading.Thread(target=run, daemon=True).start()
    return future
