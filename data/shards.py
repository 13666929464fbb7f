"""The format of prepared data: WebDataset tar shards of token blocks, and the manifest that is the truth about them.

A sample of a shard is a block of whole documents: `KEY.tok.bin`, tokens (uint16 or uint32, little endian, each document
followed by the end-of-text token), and `KEY.doc.bin`, where its documents start in the block (uint32). The cost of a
tar is per member, so blocks are large. `manifest.json` lists each split's shards with bytes, hash and counts.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError
from data import index
from data.index import PAGE, Index

VERSION = 1
BLOCK = 256 * 1024  # tokens after which a block ends with its document
MANY = 1000  # shards from which on a manifest lists them in columns


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard."""

    path: str  # relative to the manifest
    bytes: int
    sha256: str
    samples: int
    documents: int
    tokens: int


COLUMNS = [f.name for f in fields(ShardEntry)]


@dataclass(frozen=True)
class Manifest:
    """A prepared data set."""

    directory: Path | str  # an address, of data on a server
    tokenizer: dict[str, Any]  # name, fingerprint, vocab_size, end (of text), ranks (file beside the manifest, or null)
    dtype: str
    splits: dict[str, Sequence[ShardEntry]]
    made_with: dict[str, Any]
    fingerprint: str


def write_shard(path: Path, documents: Iterable[np.ndarray], dtype: str) -> ShardEntry:
    """Write token documents (each with its end-of-text token) in order; the file appears whole or not at all."""
    import webdataset  # late: it brings torch, which who reads or tokenizes does not need

    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        writer = webdataset.TarWriter(f, encoder=False, mtime=0)
        for number, block in enumerate(_blocks(documents)):
            starts = np.cumsum([0] + [len(d) for d in block[:-1]]).astype("<u4")
            data = np.concatenate(block).astype(np.dtype(dtype).newbyteorder("<"))
            sample = {"__key__": f"{path.stem}-{number:05d}", "tok.bin": data.tobytes(), "doc.bin": starts.tobytes()}
            writer.write(sample)
        writer.close()
        f.flush()
        os.fsync(f.fileno())
    made = index.build(temporary)
    index.write(made, path)
    os.rename(temporary, path)
    return describe(path, made, dtype)


def describe(path: Path, made: Index, dtype: str) -> ShardEntry:
    """What a manifest says of a shard that is there with its index."""
    _, tokens, _, starts = made.blocks.sum(axis=0).tolist()
    counts = len(made.blocks), starts // 4, tokens // np.dtype(dtype).itemsize
    return ShardEntry(path.name, path.stat().st_size, made.sha256, *counts)


def _blocks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    block: list[np.ndarray] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document)
        if size >= BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(
    directory: Path,
    tokenizer: dict[str, Any],
    dtype: str,
    splits: dict[str, Sequence[ShardEntry]],
    made_with: dict[str, Any],
) -> None:
    """Write `directory/manifest.json`: a split's shards one by one, or in columns where they are many."""
    listed: dict[str, Any] = {}
    for name, shards in splits.items():
        rows = [asdict(s) for s in shards]
        listed[name] = rows if len(rows) <= MANY else {c: [r[c] for r in rows] for c in COLUMNS}
    content = {"version": VERSION, "tokenizer": tokenizer, "dtype": dtype, "splits": listed, "made_with": made_with}
    temporary = directory / "manifest.tmp"
    temporary.write_text(json.dumps(content, indent=None if _many(splits) else 1) + "\n")
    os.rename(temporary, directory / "manifest.json")


def _many(splits: dict[str, Sequence[ShardEntry]]) -> bool:
    return any(len(shards) > MANY for shards in splits.values())


class Entries(Sequence):
    """The shards of a split, kept in columns: an object each would take a second to make for 100,000."""

    def __init__(self, listed: list[dict[str, Any]] | dict[str, list[Any]]):
        """Raises KeyError, TypeError, ValueError for what is no list of shards."""
        columns = listed if isinstance(listed, dict) else {c: [s[c] for s in listed] for c in COLUMNS}
        self.columns: dict[str, Any] = {}
        for name in COLUMNS:
            kind = str if name in ("path", "sha256") else int
            if not set(map(type, columns[name])) <= {kind} or len(columns[name]) != len(columns["path"]):
                raise TypeError(f"{name} of the shards is not {kind.__name__} of each")
            self.columns[name] = columns[name] if kind is str else np.array(columns[name], np.int64)
        if not set(map(len, columns["sha256"])) <= {64}:
            raise ValueError("a sha256 has not 64 digits")
        self.columns["sha256"] = np.array(columns["sha256"], "S64")  # a third of what 100,000 strings take
        self.tokens: np.ndarray = self.columns["tokens"]

    def __len__(self) -> int:
        return len(self.columns["path"])

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        path, size, sha256, *counts = (self.columns[c][i] for c in COLUMNS)
        return ShardEntry(path, int(size), sha256.decode(), *map(int, counts))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented


def read_manifest(path: str | Path) -> Manifest:
    """Read and check `path/manifest.json`. Raises DataError."""
    directory = Path(path)
    where = directory / "manifest.json"
    try:
        raw = where.read_bytes()
    except FileNotFoundError as e:
        raise no_manifest(directory) from e
    except OSError as e:
        raise DataError("manifest", where, f"not readable ({type(e).__name__} {e})", "prepare the data again") from e
    return parse_manifest(raw, directory)


def no_manifest(where: Path | str) -> DataError:
    """There is no such data."""
    return DataError("data", where, "no manifest.json there", "make it with python -m data.prepare")


def parse_manifest(raw: bytes, directory: Path | str) -> Manifest:
    """A manifest from its text; `directory` (or an address) is where it lies. Raises DataError."""
    where = f"{directory}/manifest.json"
    try:
        text = raw.decode()
        del raw  # of 100,000 shards it is 15 MB
        content = json.loads(text)
        del text
        if content["version"] != VERSION:
            raise DataError("manifest", where, f"has version {content['version']}", "prepare the data again")
        splits = {name: Entries(shards) for name, shards in content["splits"].items()}
        parts = (content["tokenizer"], content["dtype"], splits, content["made_with"])
        outside = [p for e in splits.values() for p in e.columns["path"] if "/" in p or "\\" in p or p.startswith(".")]
        odd = [h for e in splits.values() for h in e.columns["sha256"].tolist() if not h.isalnum()]
        np.dtype(content["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError("manifest", where, f"not readable ({type(e).__name__} {e})", "prepare the data again") from e
    if outside or odd:
        why = f"names a path outside: {outside[0]}" if outside else f"has a hash that is none: {odd[0]!r}"
        raise DataError("manifest", where, why, "prepare the data again")
    return Manifest(directory, *parts, _fingerprint(content["tokenizer"], content["dtype"], splits))


def _fingerprint(tokenizer: dict[str, Any], dtype: str, splits: dict[str, Entries]) -> str:
    """Stands for the tokens and their order: of the tokenizer, and the names and hashes of all shards."""
    digest = hashlib.sha256(json.dumps([tokenizer, dtype], sort_keys=True).encode())
    for name, entries in splits.items():
        digest.update("\n".join([name, *entries.columns["path"]]).encode() + entries.columns["sha256"].tobytes())
    return digest.hexdigest()


class Shard:
    """Random access to the token stream of one shard: its blocks one after the other.

    It is read by position and never mapped, so that its pages are not this process's memory and a file cut short under
    it is an error rather than a signal. Each page is compared with its checksum when it is first needed.
    """

    def __init__(
        self, directory: Path | str, entry: ShardEntry, dtype: str, verify: bool = False,
        file: str | None = None, name: str | None = None,
    ):  # fmt: skip
        """`verify` compares the hash of the whole file first. A copy of a remote shard has another file name, and
        messages call it by `name`. Raises DataError.
        """
        self.path, self.entry = Path(directory, file or entry.path), entry
        self.name = name or str(self.path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        try:
            self._file = os.open(self.path, os.O_RDONLY)
            self.index = self._index(verify)
        except FileNotFoundError as e:
            raise self._damaged(f"is missing, with samples 0 to {entry.samples - 1}") from e
        except OSError as e:
            raise self._damaged(f"cannot be read ({e.strerror})") from e
        self.offsets = np.concatenate(([0], np.cumsum(self.index.blocks[:, 1]))) // self.dtype.itemsize
        found = len(self.index.blocks), int(self.index.blocks[:, 3].sum()) // 4, int(self.offsets[-1])
        listed = (entry.samples, entry.documents, entry.tokens)
        if found != listed:
            raise self._damaged(f"has {found} samples, documents and tokens where the manifest says {listed}")
        self._begins, self._table = self.offsets.tolist(), self.index.blocks.tolist()
        self._good = bytearray(len(self.index.checksums))  # pages that were compared
        self._starts: dict[int, np.ndarray] = {}

    def __del__(self):
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def starts(self) -> np.ndarray:
        """Where each document starts in the stream, int64."""
        parts = [self._block_starts(i) for i in range(len(self._table))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the stream, int64."""
        return self.tokens(start, end).astype(np.int64)

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the stream in the shard's own dtype. Raises DataError for a damaged sample."""
        parts, width = [], self.dtype.itemsize
        for block, begin, stop in self._spans(start, end):
            place = self._table[block][0] + (begin - self._begins[block]) * width
            parts.append(np.frombuffer(self._bytes(place, (stop - begin) * width), self.dtype))
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, self.dtype)])

    def starts_within(self, start: int, end: int) -> np.ndarray:
        """Where documents start in the stream, those with start < place <= end. Raises DataError."""
        parts = []
        for block, _, _ in self._spans(start + 1, min(end + 1, len(self))):
            starts = self._block_starts(block)
            parts.append(starts[starts.searchsorted(start, "right") : starts.searchsorted(end, "right")])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int64)])

    def _spans(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(block, begin, stop) of the parts of [start, end) by block."""
        block = bisect_right(self._begins, start) - 1
        while start < end:
            stop = min(end, self._begins[block + 1])
            if start < stop:
                yield block, start, stop
            start, block = stop, block + 1

    def _block_starts(self, block: int) -> np.ndarray:
        if block not in self._starts:
            _, _, place, size = self._table[block]
            begins = np.frombuffer(self._bytes(place, size), "<u4").astype(np.int64)
            tokens = self._begins[block + 1] - self._begins[block]
            if not len(begins) or begins[0] != 0 or (np.diff(begins) <= 0).any() or begins[-1] >= tokens:
                raise self._damaged(f"sample {block} has wrong document starts")
            self._starts[block] = begins + self._begins[block]
        return self._starts[block]

    def _bytes(self, place: int, size: int) -> memoryview | bytes:
        """Bytes of the file; the pages among them that are new are compared with their checksums."""
        first, last = place // PAGE, (place + size - 1) // PAGE + 1
        if self._good.find(0, first, last) < 0:
            return self._pread(place, size)
        data = memoryview(self._pread(first * PAGE, min(last * PAGE, self.entry.bytes) - first * PAGE))
        for page in range(first, last):
            at = (page - first) * PAGE
            if not self._good[page] and zlib.crc32(data[at : at + PAGE]) != self.index.checksums[page]:
                raise self._damaged(f"sample {self.index.sample(page)} does not match its checksum{self._html()}")
            self._good[page] = 1
        return data[place - first * PAGE :][:size]

    def _pread(self, place: int, size: int) -> bytes:
        try:
            data = os.pread(self._file, size, place)
        except OSError as e:
            raise self._damaged(f"cannot be read at byte {place} ({e.strerror})") from e
        if len(data) != size:
            end = place + len(data)
            raise self._damaged(f"ends at byte {end}, before sample {self.index.sample(end // PAGE)} does")
        return data

    def _index(self, verify: bool) -> Index:
        """The one beside the shard, or one made now, where the hash of the whole is compared. Raises OSError."""
        size, known = os.fstat(self._file).st_size, index.read(self.path, self.entry.sha256)
        if size != self.entry.bytes:
            raise self._damaged(f"has {size} bytes instead of {self.entry.bytes}{self._first_fault(known)}")
        if known and not verify:
            return known
        if sha256(self.path) != self.entry.sha256:
            raise self._damaged(f"does not match its hash{self._first_fault(known)}")
        try:
            made = index.build(self.path)
        except index.IndexFault as e:
            raise self._damaged(str(e)) from e
        with suppress(OSError):  # of a directory that is read only: it is made again each time
            index.write(made, self.path)
        return made

    def _first_fault(self, known: Index | None) -> str:
        """Where a whole file begins to differ, if its index is there to tell."""
        where = f", sample {known.first_fault(index.hashes(self.path)[1])} is the first that differs" if known else ""
        return where + self._html()

    def _html(self) -> str:
        """What a server that fails puts in place of a file is worth a word."""
        with open(self.path, "rb") as f:
            return " (it is HTML)" if f.read(64).lstrip().lower().startswith((b"<!doctype", b"<html")) else ""

    def _damaged(self, why: str) -> DataError:
        return DataError("shard", self.name, why, "restore it, or prepare the data again")
