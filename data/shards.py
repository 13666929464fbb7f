"""The format of prepared data: WebDataset tar shards of token blocks, and the manifest that is the truth about them.

A sample of a shard is a block of whole documents: `KEY.tok.bin`, tokens (uint16 or uint32, little endian, each document
followed by the end-of-text token), and `KEY.doc.bin`, where its documents start in the block (uint32). The cost of a
tar is per member, so blocks are large. `manifest.json` lists each split's shards with bytes, hash and counts.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from configs.errors import DataError

VERSION = 1
BLOCK = 256 * 1024  # tokens after which a block ends with its document


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of a shard."""

    path: str  # relative to the manifest
    bytes: int
    sha256: str
    samples: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Manifest:
    """A prepared data set."""

    directory: Path
    tokenizer: dict[str, Any]  # name, fingerprint, vocab_size, end (of text), ranks (file beside the manifest, or null)
    dtype: str
    splits: dict[str, list[ShardEntry]]
    made_with: dict[str, Any]
    fingerprint: str


def write_shard(path: Path, documents: Iterable[np.ndarray], dtype: str) -> ShardEntry:
    """Write token documents (each with its end-of-text token) in order; the file appears whole or not at all."""
    samples = count = tokens = 0
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as f:
        writer = webdataset.TarWriter(f, encoder=False, mtime=0)
        for block in _blocks(documents):
            starts = np.cumsum([0] + [len(d) for d in block[:-1]]).astype("<u4")
            data = np.concatenate(block).astype(np.dtype(dtype).newbyteorder("<"))
            sample = {"__key__": f"{path.stem}-{samples:05d}", "tok.bin": data.tobytes(), "doc.bin": starts.tobytes()}
            writer.write(sample)
            samples, count, tokens = samples + 1, count + len(block), tokens + len(data)
        writer.close()
        f.flush()
        os.fsync(f.fileno())
    os.rename(temporary, path)
    return ShardEntry(path.name, path.stat().st_size, sha256(path), samples, count, tokens)


def _blocks(documents: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    block: list[np.ndarray] = []
    for document in documents:
        block.append(document)
        if sum(map(len, block)) >= BLOCK:
            yield block
            block = []
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
    splits: dict[str, list[ShardEntry]],
    made_with: dict[str, Any],
) -> None:
    """Write `directory/manifest.json`."""
    listed = {name: [asdict(s) for s in shards] for name, shards in splits.items()}
    content = {"version": VERSION, "tokenizer": tokenizer, "dtype": dtype, "splits": listed, "made_with": made_with}
    (directory / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


def read_manifest(path: str | Path) -> Manifest:
    """Read and check `path/manifest.json`. Raises DataError."""
    directory = Path(path)
    where = directory / "manifest.json"
    try:
        content = json.loads(where.read_text())
        if content["version"] != VERSION:
            raise DataError("manifest", where, f"has version {content['version']}", "prepare the data again")
        splits = {name: [ShardEntry(**s) for s in shards] for name, shards in content["splits"].items()}
        parts = (content["tokenizer"], content["dtype"], splits, content["made_with"])
    except FileNotFoundError as e:
        raise DataError("data", directory, "no manifest.json there", "make it with python -m data.prepare") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError("manifest", where, f"not readable ({type(e).__name__} {e})", "prepare the data again") from e
    for shard in (s for shards in splits.values() for s in shards):
        if Path(shard.path).name != shard.path:
            raise DataError("manifest", where, f"names a path outside: {shard.path}", "prepare the data again")
    truth = json.dumps([content["tokenizer"], content["dtype"], content["splits"]], sort_keys=True)
    return Manifest(directory, *parts, hashlib.sha256(truth.encode()).hexdigest())


class Shard:
    """Random access to the token stream of one shard: its blocks one after the other."""

    def __init__(self, directory: Path, entry: ShardEntry, dtype: str, verify: bool):
        self.path, self.entry = directory / entry.path, entry
        self._check_file(verify)
        kind = np.dtype(dtype).newbyteorder("<")
        data = np.memmap(self.path, mode="r", dtype=np.uint8)
        self.blocks, starts, place = [], [], 0
        for sample, (tok, doc) in enumerate(self._members()):
            block = data[tok.offset_data : tok.offset_data + tok.size].view(kind)
            begins = data[doc.offset_data : doc.offset_data + doc.size].view("<u4").astype(np.int64)
            if not len(begins) or begins[0] != 0 or (np.diff(begins) <= 0).any() or begins[-1] >= len(block):
                raise self._damaged(f"sample {sample} has wrong document starts")
            self.blocks.append(block)
            starts.append(begins + place)
            place += len(block)
        self.offsets = np.cumsum([0] + [len(b) for b in self.blocks])  # of each block in the stream, and the end
        self.starts = np.concatenate(starts) if starts else np.zeros(0, np.int64)  # of each document in the stream
        found = (len(self.blocks), len(self.starts), place)
        if found != (entry.samples, entry.documents, entry.tokens):
            listed = (entry.samples, entry.documents, entry.tokens)
            raise self._damaged(f"has {found} samples, documents and tokens where the manifest says {listed}")

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens [start, end) of the stream, int64."""
        out, block = np.empty(end - start, np.int64), int(np.searchsorted(self.offsets, start, "right")) - 1
        done = start
        while done < end:
            stop = min(end, int(self.offsets[block + 1]))
            base = int(self.offsets[block])
            out[done - start : stop - start] = self.blocks[block][done - base : stop - base]
            done, block = stop, block + 1
        return out

    def _check_file(self, verify: bool) -> None:
        try:
            size = self.path.stat().st_size
        except OSError as e:
            raise self._damaged("is missing") from e
        if size != self.entry.bytes:
            raise self._damaged(f"has {size} bytes instead of {self.entry.bytes}")
        if verify and sha256(self.path) != self.entry.sha256:
            raise self._damaged("does not match its hash")

    def _members(self) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo]]:
        try:
            with tarfile.open(self.path, "r:") as tar:
                members = {m.name: m for m in tar.getmembers() if m.isreg()}
        except tarfile.TarError as e:
            raise self._damaged(f"is no tar file ({e})") from e
        keys = sorted({name.split(".", 1)[0] for name in members})
        for key in keys:
            pair = members.get(f"{key}.tok.bin"), members.get(f"{key}.doc.bin")
            if None in pair:
                raise self._damaged(f"sample {key} lacks its tok.bin or doc.bin")
            yield pair

    def _damaged(self, why: str) -> DataError:
        return DataError("shard", self.path, why, "restore it, or prepare the data again")
