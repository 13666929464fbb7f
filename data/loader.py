"""Batches whose order is a pure function of (seed, rows consumed): any number of ranks reads the same global batches.

The state is a few numbers, the same on every rank. A change of the length of rows is part of it: a stage ends where it
was left, what its rows had not read of the window under way is read first, then the windows after it.
"""

import hashlib
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from configs.errors import DataError
from configs.schema import LongDocuments, OnBadShard
from data.order import Mixture, Rows, Window
from data.pack import fill
from data.shards import Shard
from data.source import Source, background
from data.store import Limits

ORDER = 3  # version of the order: changed with everything that changes which row comes when
LIMITS = Limits()
PLAN = 512  # rows whose places are computed at once, about


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host."""

    tokens: torch.Tensor  # int32 [rows, seq_len]
    labels: torch.Tensor  # int32 [rows, seq_len], -100 where nothing is predicted
    cu_seqlens: torch.Tensor  # int32 [documents + 1] over the flattened rows; a row always starts a document
    padding: int = 0  # tokens that are of no document

    @property
    def positions(self) -> torch.Tensor:
        """Place of each token in its document, int32 [rows, seq_len]."""
        out, ends = np.empty(self.tokens.numel(), np.int32), self.cu_seqlens.tolist()
        count = np.arange(max(b - a for a, b in pairwise(ends)), dtype=np.int32)
        for start, end in pairwise(ends):
            out[start:end] = count[: end - start]
        return torch.from_numpy(out).view(self.tokens.shape)


@dataclass(frozen=True)
class Place:
    """Of a row: which of which window of which source."""

    source: int
    window: Window
    row: int


def not_passed_over(number: int, skip: Sequence[tuple[int, int]]) -> int:
    """The first batch from `number` on that lies in none of the spans (first, last)."""
    while over := next((last for first, last in skip if first <= number <= last), None):
        number = over + 1
    return number


class Loader:
    """The rows of one data-parallel rank."""

    def __init__(
        self,
        path: str | dict[str, float],
        split: str,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        long_documents: LongDocuments = LongDocuments.carry,
        verify: bool = False,
        on_bad_shard: OnBadShard = OnBadShard.stop,
        read_ahead: int = 0,
        limits: Limits = LIMITS,
        skip: Sequence[Sequence[int]] = (),
    ):
        """`path` is a data set, or several with weights; `skip` has first and last of the batches to pass over.

        Raises DataError if a data set is missing, or empty in the split.
        """
        mix = {path: 1.0} if isinstance(path, str) else dict(path)
        self.sources = [Source(p, split, long_documents, verify, limits) for p in mix]
        self.manifest = self.sources[0].manifest
        self.weights = Mixture(list(mix.values()))
        self.paths, self.split, self.seq_len, self.seed = list(mix), split, seq_len, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.long_documents, self.on_bad_shard, self.read_ahead = long_documents, on_bad_shard, read_ahead
        self._check_tokenizers()
        self.skip = [(first, last) for first, last in skip]
        self.damaged: dict[int, DataError] = {}  # rows of the last step that could not be read here
        self.skipped = 0  # rows without content so far, over all ranks that share their damage
        self._lock = threading.Lock()  # of everything that reads
        self._begin([], 0)

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return self.manifest.tokenizer["vocab_size"]

    @property
    def retries(self) -> int:
        """Requests to servers that failed and were made again, in this process."""
        return sum(s.store.retries for s in self.sources)

    @property
    def fingerprint(self) -> str:
        """Names the data sets."""
        names = [s.manifest.fingerprint for s in self.sources]
        return names[0] if len(names) == 1 else hashlib.sha256("".join(names).encode()).hexdigest()

    @property
    def total(self) -> int:
        """Rows of an epoch of the first source."""
        return self.order[0].total

    def check(self) -> None:
        """Raises DataError if a shard on this machine is missing or of another size."""
        for source in self.sources:
            source.check()

    def holding(self, split: str) -> dict[str, float]:
        """The data sets that have something in a split, with their weights."""
        weights = self.weights.counts.tolist()
        return {p: w for p, w, s in zip(self.paths, weights, self.sources) if len(s.manifest.splits.get(split, []))}

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch.

        Raises DataError for a damaged shard; under `skip` the rows it concerns are in `damaged`, and empty.
        """
        first = self._next(self.consumed)
        batches, self.damaged = self._ahead.pop(first).result() if first in self._ahead else self._step(first)
        self.consumed = first + self.global_batch
        for _ in range(self.read_ahead):
            first = self._next(first + self.global_batch)
            self._prefetch(first)
        self.skipped += len(self.damaged)
        return batches

    def blank(self, batches: list[Batch], rows: set[int]) -> list[Batch]:
        """The last step with these rows empty too: they are damaged for another rank that holds them."""
        first = self.consumed - self.global_batch + self.dp_rank * (self.global_batch // self.dp_size)
        more = {k for k in rows - set(self.damaged) if first <= k < first + self.global_batch // self.dp_size}
        self.skipped += len(rows) - len(self.damaged)
        if not more:
            return batches
        with self._lock:
            return self._read(first, more | set(self.damaged))[0]

    @property
    def batch(self) -> int:
        """Number of the last global batch, counted from 1 in the order of the data, those passed over included."""
        return self._before + self.consumed // self.global_batch

    @property
    def coming(self) -> tuple[int, int]:
        """Number of the next one, and its first row."""
        row = self._next(self.consumed)
        return self._before + row // self.global_batch + 1, row

    def _next(self, row: int) -> int:
        """The first row of the next step's batch, after `row` rows and those that are passed over."""
        number = self._before + row // self.global_batch + 1
        return row + (not_passed_over(number, self.skip) - number) * self.global_batch

    def origin(self, row: int) -> list[tuple[Shard, int, int]]:
        """The (shard, begin, end) that a row consists of. Raises DataError for a damaged shard."""
        place = self._place(row)
        return self.sources[place.source].pieces(place.window, place.row, self.seq_len)

    def reset(self) -> None:
        """Begin anew."""
        self._begin([], 0)

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins, and in which order of what."""
        place = {"seq_len": self.seq_len, "consumed_rows": self.consumed, "stages": self.stages}
        return {**self._identity(), **place, "skipped_rows": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was, with its length of rows or another one.

        Raises DataError if that one read other data, or in another order.
        """
        for key, value in self._identity().items():
            if state.get(key) != value:
                why = f"{key} is {value}, the checkpoint was made with {state.get(key)}"
                raise DataError("data", ", ".join(self.paths), why, "continue with the same data and options")
        stages, consumed = [list(s) for s in state["stages"]], state["consumed_rows"]
        if state["seq_len"] != self.seq_len:
            stages, consumed = [*stages, [state["seq_len"], consumed]], 0
        self.skipped = state["skipped_rows"]
        self._begin(stages, consumed)

    def _identity(self) -> dict[str, Any]:
        order = {"order": ORDER, "seed": self.seed, "long_documents": self.long_documents.value}
        return {"fingerprint": self.fingerprint, "weights": self.weights.counts.tolist(), "split": self.split, **order}

    def _begin(self, stages: list[list[int]], consumed: int) -> None:
        """Lay out the order after stages of [seq_len, rows] and take the place after `consumed` rows of the last."""
        rests: list[Window | None] = [None] * len(self.sources)
        for seq_len, rows in stages:
            taken = self.weights.taken(rows)
            order = [s.rows(seq_len, self.seed, rest) for s, rest in zip(self.sources, rests)]
            rests = [self._unread(s, o, n) for s, o, n in zip(self.sources, order, taken)]
        with self._lock:  # a step that is read ahead ends before the order changes under it
            self.order: list[Rows] = [s.rows(self.seq_len, self.seed, rest) for s, rest in zip(self.sources, rests)]
            self.stages, self.consumed = stages, consumed
            self._before = sum(rows for _, rows in stages) // self.global_batch  # batches of earlier stages
            self._ahead: dict[int, Future] = {}
            self._places: dict[int, Place] = {}

    def _unread(self, source: Source, order: Rows, taken: int) -> Window:
        return order.unread(taken, lambda window, row: source.spans(window, row, order.step))

    def _prefetch(self, first: int) -> None:
        if first not in self._ahead:
            self._ahead[first] = background(lambda: self._read_step(first), self._lock)

    def _step(self, first: int) -> tuple[list[Batch], dict[int, DataError]]:
        with self._lock:
            return self._read_step(first)

    def _read_step(self, first: int) -> tuple[list[Batch], dict[int, DataError]]:
        return self._read(first + self.dp_rank * (self.global_batch // self.dp_size), set())

    def _read(self, first: int, empty: set[int]) -> tuple[list[Batch], dict[int, DataError]]:
        damaged: dict[int, DataError] = {}
        rows = range(first, first + self.global_batch // self.dp_size)
        out = [
            self._batch(rows[i : i + self.micro_batch], empty, damaged) for i in range(0, len(rows), self.micro_batch)
        ]
        return out, damaged

    def _batch(self, rows: range, empty: set[int], damaged: dict[int, DataError]) -> Batch:
        """These rows of the endless sequence, with those in `empty` and the damaged ones without content."""
        tokens, labels = (np.empty((len(rows), self.seq_len), np.int32) for _ in range(2))
        starts: list[int] = []
        padding, end = 0, self.manifest.tokenizer["end"]
        for i, k in enumerate(rows):
            pieces = []
            try:
                if k not in empty:
                    pieces = self.origin(k)
                found = fill(tokens[i], labels[i], pieces, end)
            except DataError as e:
                if self.on_bad_shard is OnBadShard.stop:
                    raise
                damaged[k], pieces = e, []
                found = fill(tokens[i], labels[i], pieces, end)
            padding += self.seq_len - sum(stop - start for _, start, stop in pieces)
            starts += found if i == 0 else [s + i * self.seq_len for s in found]
        starts.append(tokens.size)
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), cu_seqlens, padding)

    def _place(self, k: int) -> Place:
        if k not in self._places:
            self._plan(k)
        return self._places[k]

    def _plan(self, k: int) -> None:
        """The places of row k and of this rank's next ones."""
        mine = self.global_batch // self.dp_size
        within = (k - self.dp_rank * mine) % self.global_batch % mine
        steps = np.arange(-(-PLAN // mine))[:, None] * self.global_batch
        slots = (k - within + steps + np.arange(mine)).ravel()
        owner, index = self.weights.locate(slots)
        self._places = {}
        for source, order in enumerate(self.order):
            chosen = np.flatnonzero(owner == source)
            if len(chosen):
                self._plan_source(source, order, slots[chosen].tolist(), index[chosen])

    def _plan_source(self, source: int, order: Rows, slots: list[int], index: np.ndarray) -> None:
        epochs, numbers, rows = (x.tolist() for x in order.locate(index))
        windows: dict[tuple[int, int], Window] = {}
        for slot, epoch, number, row in zip(slots, epochs, numbers, rows):
            name = epoch, number
            if name not in windows:
                windows[name] = order.window(epoch, number)
            self._places[slot] = Place(source, windows[name], row)
        coming = order.window(*order.next_window(int(index[-1])))
        self.sources[source].ahead([*windows.values(), coming])

    def _check_tokenizers(self) -> None:
        first = self.manifest.tokenizer
        for path, source in zip(self.paths, self.sources):
            if source.manifest.tokenizer["fingerprint"] != first["fingerprint"]:
                why = f"has another tokenizer ({source.manifest.tokenizer['name']}) than {self.paths[0]}"
                raise DataError("data", path, why, "prepare both with the same")
