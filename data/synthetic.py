"""Rows of random tokens instead of a data set, to measure speed and memory: no files, and nothing to learn.

Row k is a function of (seed, k) alone, as rows of prepared data are, and one document.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs.errors import DataError
from data.loader import Batch, not_passed_over


class RandomRows:
    """The rows of one data-parallel rank; to train.py what data.loader.Loader is."""

    split = "train"

    def __init__(
        self, vocab: int, seq_len: int, global_batch: int, micro_batch: int, seed: int, dp_rank: int, dp_size: int,
        skip: Sequence[Sequence[int]] = (),
    ):  # fmt: skip
        self.vocab_size, self.seq_len, self.seed = vocab, seq_len, seed
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.skip = [(first, last) for first, last in skip]
        self.paths: list[str] = []
        self.consumed = self.skipped = self.retries = 0
        self.damaged: dict[int, DataError] = {}  # always: nothing is read

    @property
    def fingerprint(self) -> str:
        """Names the data."""
        return f"random-{self.vocab_size}"

    def holding(self, split: str) -> dict[str, float]:
        """Nothing is held out of random rows."""
        return {}

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch."""
        mine = self.global_batch // self.dp_size
        first = self.coming[1] + self.dp_rank * mine
        self.consumed = self.coming[1] + self.global_batch
        return [self._batch(range(k, k + self.micro_batch)) for k in range(first, first + mine, self.micro_batch)]

    @property
    def batch(self) -> int:
        """Number of the last global batch, counted from 1."""
        return self.consumed // self.global_batch

    @property
    def coming(self) -> tuple[int, int]:
        """Number and first row of the next global batch that is not to be passed over."""
        number = not_passed_over(self.batch + 1, self.skip)
        return number, (number - 1) * self.global_batch

    def state_dict(self) -> dict[str, Any]:
        """Where the next step begins."""
        return {"fingerprint": self.fingerprint, "seed": self.seed, "consumed_rows": self.consumed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another one was. Raises DataError if that one drew other rows."""
        for key in ("fingerprint", "seed"):
            if state.get(key) != self.state_dict()[key]:
                why = f"{key} is {self.state_dict()[key]}, the checkpoint was made with {state.get(key)}"
                raise DataError("data", "data.random", why, "continue with the same data and options")
        self.consumed = state["consumed_rows"]

    def _batch(self, rows: range) -> Batch:
        drawn = np.stack([self._row(k) for k in rows])
        cu_seqlens = torch.arange(len(rows) + 1, dtype=torch.int32) * self.seq_len
        return Batch(torch.from_numpy(drawn[:, :-1].copy()), torch.from_numpy(drawn[:, 1:].copy()), cu_seqlens)

    def _row(self, k: int) -> np.ndarray:
        """int32 [seq_len + 1]: the label of the last token is one more."""
        return np.random.default_rng((self.seed, k)).integers(self.vocab_size, size=self.seq_len + 1, dtype=np.int32)
