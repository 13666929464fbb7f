"""Which row comes when, by arithmetic alone: nothing is drawn, stored or counted through.

A mixture deals its slots to the sources in a fixed round. A source groups its shards into windows of a few; an epoch
permutes the windows and, inside each, the rows. Everything works on arrays of positions at once.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

import numpy as np

WINDOW = 8  # shards whose rows are mixed with one another
ROUND = 1 << 16  # most slots of a mixture's round; finer weights are rounded to it


def name_key(*parts: object) -> int:
    """64 bits that stand for the parts."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64, bit by bit of the input into all of the output (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Where each index goes in the permutation of range(size) that its key names; int64 of the shape of `index`.

    A Feistel network of four rounds on an even number of bits, walked until it lands inside.
    """
    index = np.atleast_1d(np.asarray(index, np.uint64))
    size, key = np.broadcast_to(np.asarray(size, np.uint64), index.shape), np.broadcast_to(_u64(key), index.shape)
    bits = np.frexp(np.maximum(size, 2).astype(np.float64) - 1)[1]  # exact below 2**53
    half = ((bits + 1) // 2).astype(np.uint64)
    out = _turn(index, half, key)
    while (outside := np.flatnonzero(out >= size)).size:
        out[outside] = _turn(out[outside], half[outside], key[outside])
    return out.astype(np.int64)


def _turn(index: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = index >> half, index & mask
    for step in (0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A, 0xDAA66D2C7DDF743F, 0x78DDE6E5FD29F054):
        left, right = right, left ^ (mix(right + key + np.uint64(step)) & mask)
    return left << half | right


def _u64(key: np.ndarray | int) -> np.ndarray:
    return key if isinstance(key, np.ndarray) else np.array(key & (2**64 - 1), np.uint64)


class Mixture:
    """The slots of several sources, dealt in rounds in which each has its exact share, evenly spread."""

    def __init__(self, weights: list[float]):
        self.counts = np.array(shares(weights), np.int64)  # slots of each source in a round
        ideal = np.concatenate([(np.arange(c) + 0.5) / c for c in self.counts])
        owner = np.repeat(np.arange(len(weights)), self.counts)
        self.round = owner[np.argsort(ideal, kind="stable")]  # source of each slot
        self.before = np.empty(len(self.round), np.int64)  # slots of the same source before it
        for source, count in enumerate(self.counts):
            self.before[self.round == source] = np.arange(count)

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many slots it had before) of each slot."""
        turn, place = np.divmod(slots, len(self.round))
        source = self.round[place]
        return source, turn * self.counts[source] + self.before[place]

    def taken(self, slots: int) -> list[int]:
        """How many of the first `slots` each source has."""
        turn, place = divmod(slots, len(self.round))
        return (turn * self.counts + np.bincount(self.round[:place], minlength=len(self.counts))).tolist()


def shares(weights: list[float]) -> list[int]:
    """Smallest whole numbers in the ratio of the weights (as written in decimal); rounded where their sum is large."""
    exact = [Fraction(str(w)) for w in weights]
    exact = [w / sum(exact) for w in exact]
    parts = math.lcm(*(w.denominator for w in exact))
    if parts <= ROUND:
        return [int(w * parts) for w in exact]
    counts = [max(1, int(w * ROUND)) for w in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i] * ROUND)
    for i in by_remainder[: max(0, ROUND - sum(counts))]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class Window:
    """Pieces of shards, one after the other, that rows are made of."""

    name: tuple[int, int]  # epoch and number, for keys and messages
    shards: list[int]
    begins: list[int]  # of each piece in its shard
    ends: list[int]  # of each piece in the window

    @cached_property
    def stretches(self) -> list[tuple[int, int, int]]:
        """(shard, start, end) of what it has of each shard, which is together."""
        last = [i for i, (a, b) in enumerate(pairwise([*self.shards, -1])) if a != b]
        ends = [self.ends[i] for i in last]
        return list(zip((self.shards[i] for i in last), [0, *ends], ends))

    def part(self, spans: list[tuple[int, int]]) -> "Window":
        """These spans of it, as a window of the same name."""
        shards, begins, lengths = [], [], []
        for start, stop in spans:
            for shard, begin, end in self.pieces(start, stop):
                shards.append(shard)
                begins.append(begin)
                lengths.append(end - begin)
        return Window(self.name, shards, begins, np.cumsum(lengths, dtype=np.int64).tolist())

    def pieces(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The (shard, begin, end) that make up [start, end) of the window; what is beyond its end is left out."""
        out, i = [], bisect_right(self.ends, start)
        while i < len(self.ends) and start < end:
            stop = min(end, self.ends[i])
            shift = self.begins[i] - (self.ends[i - 1] if i else 0)
            out.append((self.shards[i], start + shift, stop + shift))
            start, i = stop, i + 1
        return out


class Rows:
    """The endless sequence of rows of one source: every row of an epoch before the first of the next.

    `sizes` has the tokens of each shard and a row takes `step` of them, of one shard alone if those are kept `apart`.
    `rest`, if the length of rows was changed inside a window, is what had not been read of it: it comes first, then the
    windows after it.
    """

    def __init__(self, sizes: np.ndarray, step: int, key: int, rest: Window | None = None, apart: bool = False):
        self.sizes, self.step, self.key, self.rest = sizes, step, key, rest
        self.shards = permute(np.arange(len(sizes)), len(sizes), name_key(key, "shards"))
        first = np.arange(0, len(sizes), WINDOW)
        mixed = sizes[self.shards]
        self.rows = np.add.reduceat(-(-mixed // step), first) if apart else -(-np.add.reduceat(mixed, first) // step)
        lengths = [end - start for _, start, end in rest.stretches] if rest else []
        self._rest_rows = sum(-(-n // step) for n in (lengths if apart else [sum(lengths)]))
        self.total = int(self.rows.sum())  # of an epoch
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.skip = 0  # rows before the first, in the sequence that begins with epoch 0
        if rest is not None:
            place = int(np.flatnonzero(self._epoch(rest.name[0])[0] == rest.name[1])[0])
            self.skip = rest.name[0] * self.total + int(self._epoch(rest.name[0])[1][place]) - self._rest_rows

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(epoch, window, row of the window) of each position; a window of the rest has the number -1 - its own."""
        epoch, place = np.divmod(index + self.skip, self.total)
        window, within = np.empty_like(place), np.empty_like(place)
        for e in np.unique(epoch):
            order, ends = self._epoch(int(e))
            mine = epoch == e
            slot = np.searchsorted(ends, place[mine], "right")
            window[mine] = order[slot]
            within[mine] = place[mine] - np.where(slot > 0, ends[slot - 1], 0)
        size = self.rows[window]
        early = index < self._rest_rows
        if early.any():
            epoch[early], window[early], within[early] = self.rest.name[0], -1 - self.rest.name[1], index[early]
            size[early] = self._rest_rows
        return epoch, window, permute(within, size, self._window_key(epoch, window))

    def window(self, epoch: int, number: int) -> Window:
        """What the rows of a window are cut from."""
        if number < 0:
            return self.rest
        shards = self.shards[number * WINDOW : (number + 1) * WINDOW]
        ends = np.cumsum(self.sizes[shards])
        return Window((epoch, number), shards.tolist(), [0] * len(shards), ends.tolist())

    def unread(self, index: int, spans: Callable[[Window, int], list[tuple[int, int]]]) -> Window:
        """What is left of the window of position `index`, of its rows before which all were read.

        `spans` gives the (start, end) in the window that one of its rows consists of; those that touch are joined.
        """
        epoch, window, _ = (int(x[0]) for x in self.locate(np.array([index])))
        first = 0 if window < 0 else self._first(index)
        count = self._rest_rows if window < 0 else int(self.rows[window])
        places = np.arange(index - first, count)
        key = self._window_key(np.full(len(places), epoch), np.full(len(places), window))
        whole = self.window(epoch, window)
        found = np.array([s for row in permute(places, count, key).tolist() for s in spans(whole, row)], np.int64)
        found = found[np.argsort(found[:, 0])]
        breaks = np.flatnonzero(found[1:, 0] != found[:-1, 1]) + 1
        joined = zip(found[np.append(0, breaks), 0].tolist(), found[np.append(breaks - 1, len(found) - 1), 1].tolist())
        return whole.part(list(joined))

    def next_window(self, index: int) -> tuple[int, int]:
        """(epoch, window) that follows the one of position `index`."""
        epoch, place = divmod(index + self.skip, self.total)
        slot = int(np.searchsorted(self._epoch(epoch)[1], place, "right")) + 1
        if slot == len(self.rows):
            epoch, slot = epoch + 1, 0
        return epoch, int(self._epoch(epoch)[0][slot])

    def _first(self, index: int) -> int:
        """Position of the first row of the window that position `index` is in."""
        epoch, place = divmod(index + self.skip, self.total)
        ends = self._epoch(epoch)[1]
        slot = int(np.searchsorted(ends, place, "right"))
        return epoch * self.total + (int(ends[slot - 1]) if slot else 0) - self.skip

    def _window_key(self, epoch: np.ndarray, window: np.ndarray) -> np.ndarray:
        return mix(mix(epoch.astype(np.uint64) + _u64(self.key)) + window.astype(np.uint64))

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows in the order of an epoch, and where each ends in rows."""
        if number not in self._epochs:
            order = permute(np.arange(len(self.rows)), len(self.rows), name_key(self.key, "epoch", number))
            self._epochs = {k: v for k, v in self._epochs.items() if abs(k - number) < 2}
            self._epochs[number] = order, np.cumsum(self.rows[order])
        return self._epochs[number]
