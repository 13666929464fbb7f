"""One prepared data set as a loader reads it: rows by position, from shards that are fetched ahead and closed again."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np

from configs.errors import DataError
from configs.schema import LongDocuments
from data.order import WINDOW, Rows, Window, name_key
from data.pack import cut_starts
from data.shards import Manifest, Shard, no_manifest, parse_manifest
from data.store import Limits, Local, Store, open_store

OPEN = 3 * WINDOW  # shards kept open: the window that is read, the one before, and the next


class Source:
    """A split of a data set. Raises DataError if there is none."""

    def __init__(self, path: str, split: str, long_documents: LongDocuments, verify: bool, limits: Limits):
        self.store: Store = open_store(path, limits)
        self.manifest = _manifest(self.store)
        self.entries = self.manifest.splits.get(split, [])
        if not len(self.entries) or not self.entries.tokens.any():
            raise DataError("data", path, f"the split {split} is empty", "prepare more data, or another --val-fraction")
        self.split, self.long_documents, self.verify = split, long_documents, verify
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._faults: dict[int, DataError] = {}
        self._cuts: dict[tuple[int, int], np.ndarray] = {}
        self._fetching: dict[int, Future] = {}
        self._slots = threading.Semaphore(4)  # fetches at once

    def rows(self, seq_len: int, seed: int, rest: Window | None = None) -> Rows:
        """The order of its rows. Where documents are cut, every shard is opened to count them."""
        key = name_key(seed, self.manifest.fingerprint, self.split)
        if self.long_documents is LongDocuments.carry:
            return Rows(self.entries.tokens, seq_len, key, rest)
        counts = np.array([len(self.cuts(i, seq_len)) for i in range(len(self.entries))])
        return Rows(counts, 1, key)

    def cuts(self, index: int, seq_len: int) -> np.ndarray:
        """Where the rows of a shard begin, if long documents are cut."""
        if (index, seq_len) not in self._cuts:
            if len(self._cuts) > 4 * OPEN:
                self._cuts.clear()
            self._cuts[index, seq_len] = cut_starts(self.shard(index), seq_len)
        return self._cuts[index, seq_len]

    def pieces(self, window: Window, row: int, seq_len: int) -> list[tuple[Shard, int, int]]:
        """What a row of a window consists of. Raises DataError for a damaged shard."""
        if self.long_documents is LongDocuments.carry:
            found = window.pieces(row * seq_len, (row + 1) * seq_len)
            return [(self.shard(i), begin, end) for i, begin, end in found]
        ((index, place, _),) = window.pieces(row, row + 1)
        shard, start = self.shard(index), int(self.cuts(index, seq_len)[place])
        return [(shard, start, min(start + seq_len, len(shard)))]

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


def _manifest(store: Store) -> Manifest:
    try:
        raw = store.read("manifest.json")
    except (FileNotFoundError, NotADirectoryError) as e:
        raise no_manifest(store.where) from e
    except OSError as e:
        where, why = f"{store.where}/manifest.json", f"not readable ({type(e).__name__} {e})"
        raise DataError("manifest", where, why, "make it readable") from e
    return parse_manifest(raw, store.where)


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
