"""The index beside a shard: where its samples are, and a checksum of every page of the file.

It says nothing that one pass over the shard could not: where it is missing or of another shard, that pass is made, with
the hash of the whole compared first. `NAME.idx` is one line of JSON and two tables.
"""

import hashlib
import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAGE = 1 << 16  # bytes that are checked together, when the first of them is needed


class IndexFault(ValueError):
    """A shard is no tar of samples; says why."""


@dataclass(frozen=True)
class Index:
    """Of one shard."""

    sha256: str  # of the whole file
    blocks: np.ndarray  # int64 [samples, 4]: place and bytes of tok.bin, place and bytes of doc.bin
    checksums: np.ndarray  # uint32 [pages]: crc32 of PAGE bytes each

    def sample(self, page: int) -> int:
        """The first sample that a page holds something of (its header, or those after it)."""
        ends = self.blocks[:, [0, 2]].max(axis=1) + self.blocks[:, [1, 3]].max(axis=1)
        return min(int(np.searchsorted(ends, page * PAGE, "right")), len(ends) - 1)

    def first_fault(self, checksums: np.ndarray) -> int:
        """The first sample of a file with these checksums that differs from what this says."""
        same = min(len(checksums), len(self.checksums))
        differ = np.flatnonzero(checksums[:same] != self.checksums[:same])
        return self.sample(int(differ[0]) if len(differ) else same)


def build(path: Path) -> Index:
    """Read a shard once. Raises IndexFault, OSError."""
    digest, checksums = hashes(path)
    return Index(digest, _blocks(path), checksums)


def hashes(path: Path) -> tuple[str, np.ndarray]:
    """sha256 of a file, and checksums of its pages. Raises OSError."""
    digest, checksums = hashlib.sha256(), []
    with open(path, "rb") as f:
        while page := f.read(PAGE):
            digest.update(page)
            checksums.append(zlib.crc32(page))
    return digest.hexdigest(), np.array(checksums, "<u4")


def _blocks(path: Path) -> np.ndarray:
    try:
        with tarfile.open(path, "r:") as tar:
            every = [m for m in tar.getmembers() if m.isreg()]
    except tarfile.TarError as e:
        raise IndexFault(f"is no tar file ({e})") from e
    members = {m.name: m for m in every}
    if len(members) < len(every):
        raise IndexFault(f"has {len(every) - len(members)} members twice")
    table = []
    for key in sorted({name.split(".", 1)[0] for name in members}):
        tok, doc = members.get(f"{key}.tok.bin"), members.get(f"{key}.doc.bin")
        if tok is None or doc is None:
            raise IndexFault(f"sample {key} lacks its tok.bin or doc.bin")
        table.append((tok.offset_data, tok.size, doc.offset_data, doc.size))
    return np.array(table, "<i8").reshape(-1, 4)


def write(index: Index, path: Path) -> None:
    """Write it beside the shard at `path`; it appears whole or not at all. Raises OSError."""
    body = index.blocks.astype("<i8").tobytes() + index.checksums.astype("<u4").tobytes()
    head = {"version": 1, "sha256": index.sha256, "samples": len(index.blocks), "crc32": zlib.crc32(body)}
    temporary = path.with_suffix(f".idx.{os.getpid()}")
    temporary.write_bytes(json.dumps(head).encode() + b"\n" + body)
    os.replace(temporary, path.with_suffix(".idx"))


def read(path: Path, sha256: str) -> Index | None:
    """The index beside the shard at `path`; None if it is missing, damaged or of other contents than `sha256`."""
    try:
        head, body = path.with_suffix(".idx").read_bytes().split(b"\n", 1)
        said = json.loads(head)
        if (said["version"], said["sha256"], said["crc32"]) != (1, sha256, zlib.crc32(body)):
            return None
        cut = said["samples"] * 32
        return Index(sha256, np.frombuffer(body[:cut], "<i8").reshape(-1, 4), np.frombuffer(body[cut:], "<u4"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
