"""Batches whose order is a pure function of (seed, rows consumed): any number of ranks reads the same global batches.

Shards are permuted, taken in windows of a few, and the rows of a window are permuted, by small Feistel networks that
are computed and never stored. The state is a few numbers, the same on every rank.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch

from configs.errors import DataError
from configs.schema import LongDocuments
from data.pack import Row, make_row, row_starts, rows
from data.shards import Shard, read_manifest

WINDOW = 8  # shards whose rows are mixed with one another


@dataclass(frozen=True)
class Batch:
    """One micro-batch, on the host."""

    tokens: torch.Tensor  # int64 [rows, seq_len]
    labels: torch.Tensor  # int64 [rows, seq_len], -100 where nothing is predicted
    cu_seqlens: torch.Tensor  # int32 [documents + 1] over the flattened rows; a row always starts a document


class Loader:
    """The rows of one data-parallel rank."""

    def __init__(
        self,
        path: str,
        split: str,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        long_documents: LongDocuments = LongDocuments.carry,
        verify: bool = True,
    ):
        """Raises DataError if there is no such data, or nothing in the split."""
        self.manifest = read_manifest(path)
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.long_documents, self.verify = long_documents, verify
        self.entries = self.manifest.splits.get(split, [])
        self.shards: dict[int, Shard] = {}
        self.row_starts: dict[int, np.ndarray] = {}
        if long_documents is LongDocuments.carry:
            self.rows = [rows(e.tokens, seq_len) for e in self.entries]
        else:  # where a row starts depends on the documents before it
            self.rows = [len(self._open(i)[1]) for i in range(len(self.entries))]
        self.total = sum(self.rows)
        if not self.total:
            raise DataError("data", path, f"the split {split} is empty", "prepare more data, or another --val-fraction")
        self.consumed = 0
        self._epoch: Optional[_Epoch] = None

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        return self.manifest.tokenizer["vocab_size"]

    @property
    def fingerprint(self) -> str:
        """Names the data set."""
        return self.manifest.fingerprint

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch. Raises DataError for a damaged shard."""
        mine = self.global_batch // self.dp_size
        first = self.consumed + self.dp_rank * mine
        out = [self._batch(k) for k in range(first, first + mine, self.micro_batch)]
        self.consumed += self.global_batch
        return out

    def reset(self) -> None:
        """Begin anew."""
        self.consumed = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins, and in which order of what."""
        return {**self._identity(), "consumed_rows": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another loader was. Raises DataError if that one read other data or in another order."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                why = f"{key} is {value}, the checkpoint was made with {state.get(key)}"
                raise DataError("data", self.manifest.directory, why, "continue with the same data and options")
        self.consumed = state["consumed_rows"]

    def _identity(self) -> dict[str, Any]:
        order = {"seed": self.seed, "seq_len": self.seq_len, "long_documents": self.long_documents.value}
        return {"fingerprint": self.fingerprint, "split": self.split, **order}

    def _batch(self, k: int) -> Batch:
        """Rows k .. k + micro_batch - 1 of the endless sequence."""
        made = [self._row(i) for i in range(k, k + self.micro_batch)]
        starts = np.concatenate([r.starts + i * self.seq_len for i, r in enumerate(made)])
        tokens, labels = (np.stack([getattr(r, name) for r in made]) for name in ("tokens", "labels"))
        cu_seqlens = torch.from_numpy(np.append(starts, len(made) * self.seq_len).astype(np.int32))
        return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), cu_seqlens)

    def _row(self, k: int) -> Row:
        epoch, place = divmod(k, self.total)
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = _Epoch(epoch, self.seed, self.rows)
        index, row = self._epoch.find(place)
        shard, starts = self._open(index)
        return make_row(shard, int(starts[row]), self.seq_len, self.manifest.tokenizer["end"])

    def _open(self, index: int) -> tuple[Shard, np.ndarray]:
        if index not in self.shards:
            shard = Shard(self.manifest.directory, self.entries[index], self.manifest.dtype, self.verify)
            self.shards[index] = shard
            self.row_starts[index] = row_starts(shard, self.seq_len, self.long_documents)
        return self.shards[index], self.row_starts[index]


class _Epoch:
    """The order of one pass over the rows of all shards."""

    def __init__(self, number: int, seed: int, rows: list[int]):
        self.number, self.key = number, f"{seed}/{number}"
        self.order = [permute(i, len(rows), self.key) for i in range(len(rows))]
        self.ends = np.cumsum([rows[i] for i in self.order])  # of the permuted shards, in rows

    def find(self, place: int) -> tuple[int, int]:
        """The (shard, row) at a place of the epoch."""
        window = int(np.searchsorted(self.ends, place, "right")) // WINDOW
        first, last = window * WINDOW, min((window + 1) * WINDOW, len(self.order))
        begin, end = self._begin(first), self._begin(last)
        place = begin + permute(place - begin, end - begin, f"{self.key}/{window}")
        shard = int(np.searchsorted(self.ends, place, "right"))
        return self.order[shard], place - self._begin(shard)

    def _begin(self, shard: int) -> int:
        return int(self.ends[shard - 1]) if shard else 0


def permute(index: int, size: int, key: str) -> int:
    """Where `index` goes in the permutation of range(size) that `key` names.

    A Feistel network on an even number of bits, walked until it lands inside.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(4):
            digest = hashlib.blake2b(b"%d %d" % (turn, right), digest_size=8, key=key.encode()).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & ((1 << half) - 1))
        index = left << half | right
        if index < size:
            return index
