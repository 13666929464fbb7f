"""python -m data.prepare: documents in, WebDataset shards of tokens out.

The output depends on the input and the options only, not on the number of workers. It is written beside the target and
renamed when it is whole. Memory is bounded by one shard: tokens are spilled to a file per shard on the way.
"""

import argparse
import gzip
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Optional

import numpy as np

from configs.errors import DataError, RunError
from data import tokenizer
from data.shards import ShardEntry, read_manifest, write_manifest, write_shard

SAMPLE = 32 << 20  # bytes of text that a vocabulary is trained on
BATCH = 1 << 20  # bytes of text that a worker gets at once
BYTES_A_TOKEN = 3.0  # a guess on the low side: it decides the number of shards before anything is tokenized
HEADER = np.dtype([("digest", "<u8"), ("index", "<u8"), ("tokens", "<u8")])


@dataclass(frozen=True)
class Document:
    """A text and where it is from; a file is read by the worker that tokenizes it."""

    name: str
    size: int  # bytes, about
    path: Optional[Path] = None
    text: Optional[str] = None

    def read(self) -> str:
        """The text; empty for a binary file. Raises DataError."""
        if self.path is None:
            return self.text or ""
        try:
            raw = self.path.read_bytes()
        except OSError as e:
            raise DataError("input", self.path, f"cannot be read ({e.strerror})", "fix or leave it out") from e
        return "" if b"\0" in raw else raw.decode("utf-8", "replace")


def documents(inputs: list[str], include: str, field: str, limit: Optional[int]) -> Iterator[Document]:
    """The input's documents in a fixed order. `limit` in bytes keeps a part that is chosen by hash of the names."""
    paths = [p for name in inputs for p in _files(name, include)]
    if limit is not None:
        paths, chosen, total = sorted(paths, key=lambda p: hashlib.sha256(p[0].encode()).digest()), [], 0
        for name, path in paths:
            if total < limit:
                chosen.append((name, path))
                total += path.stat().st_size
        paths = sorted(chosen)
    for name, path in paths:
        if path.suffixes[-1:] == [".jsonl"] or path.suffixes[-2:] == [".jsonl", ".gz"]:
            yield from _jsonl(name, path, field)
        else:
            yield Document(name, path.stat().st_size, path=path)


def _files(name: str, include: str) -> list[tuple[str, Path]]:
    """(name, path) of the files of one input; `stdlib` is the sources of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"]) if name == "stdlib" else Path(name)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError("input", name, "no such file or directory", "give files, directories, or stdlib")
    found = (p for p in root.rglob("*.py" if name == "stdlib" else include) if p.is_file() and not p.is_symlink())
    return sorted((str(p.relative_to(root)), p) for p in found if "site-packages" not in p.relative_to(root).parts)


def _jsonl(name: str, path: Path, field: str) -> Iterator[Document]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError) as e:
                why = f"line {number} is no object with a text in {field} ({type(e).__name__})"
                raise DataError("input", path, why, "fix the line, or name the field with --field") from e
            yield Document(f"{name}:{number}", len(text), text=text)


def _encode(name: str, ranks: Optional[str], batch: list[Document]) -> list[tuple[int, np.ndarray]]:
    """(digest of the text, tokens with the end-of-text token) of each document that is not empty."""
    encoding, out = tokenizer.load(name, ranks), []
    for text in (d.read() for d in batch):
        if text:
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            tokens = np.append(encoding.encode_to_numpy(text, disallowed_special=()), encoding.eot_token)
            out.append((int.from_bytes(digest, "big"), tokens.astype(np.uint32)))
    return out


def encoded(texts: Iterable[Document], name: str, ranks: Optional[str], workers: int) -> Iterator[tuple[int, Any]]:
    """Tokenize on `workers` processes, in order, with few batches under way; yields (bytes, what _encode gave)."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting: deque[tuple[int, Future]] = deque()
        for batch in _batches(texts):
            waiting.append((sum(d.size for d in batch), pool.submit(_encode, name, ranks, batch)))
            if len(waiting) > 3 * workers:
                size, future = waiting.popleft()
                yield size, future.result()
        for size, future in waiting:
            yield size, future.result()


def _batches(texts: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in texts:
        batch.append(document)
        size += document.size
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class Spill:
    """Tokenized documents on disk, one file for each shard to be."""

    def __init__(self, directory: Path, shards: int, val_fraction: float, seed: int):
        self.directory, self.shards, self.val_fraction, self.seed = directory, shards, val_fraction, seed
        self.count = 0

    def add(self, encoded: list[tuple[int, np.ndarray]]) -> None:
        """Append each document to the shard that the hash of its text names: equal texts share a split."""
        parts: dict[Path, list[bytes]] = {}
        for digest, tokens in encoded:
            mixed = hashlib.blake2b(b"%d %d" % (self.seed, digest), digest_size=16).digest()
            held_out = int.from_bytes(mixed[:8], "big") < self.val_fraction * 2**64
            shard = 0 if held_out else int.from_bytes(mixed[8:], "big") % self.shards
            header = np.array((digest, self.count, len(tokens)), HEADER)
            self.count += 1
            path = self.directory / f"{'val' if held_out else 'train'}-{shard:06d}.spill"
            parts.setdefault(path, []).append(header.tobytes() + tokens.tobytes())
        for path, data in parts.items():
            with open(path, "ab") as f:
                f.write(b"".join(data))

    def drain(self, dtype: str) -> dict[str, list[ShardEntry]]:
        """Write the shards, each with its documents in the order of their hashes, and remove the spilled files."""
        splits: dict[str, list[ShardEntry]] = {"train": [], "val": []}
        for path in sorted(self.directory.glob("*.spill")):
            texts = [tokens for _, tokens in sorted(_read_spill(path), key=lambda item: item[0])]
            splits[path.stem.split("-")[0]].append(write_shard(path.with_suffix(".tar"), texts, dtype))
            path.unlink()
        return splits


def _read_spill(path: Path) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    data, place = path.read_bytes(), 0
    while place < len(data):
        digest, index, count = (int(x) for x in np.frombuffer(data, HEADER, 1, place)[0])
        place += HEADER.itemsize
        yield (digest, index), np.frombuffer(data, np.uint32, count, place)
        place += count * 4


class Progress:
    """A line every few seconds: how much is done, how fast, how long it will take."""

    def __init__(self, total: int):
        self.total, self.done, self.tokens = total, 0, 0
        self.start = self.shown = time.monotonic()

    def add(self, size: int, tokens: int) -> None:
        """Count a batch."""
        self.done, self.tokens = self.done + size, self.tokens + tokens
        if time.monotonic() - self.shown >= 2:
            self.show()

    def show(self) -> None:
        """Print the line."""
        self.shown = time.monotonic()
        rate = self.done / max(1e-9, self.shown - self.start)
        left = (self.total - self.done) / max(rate, 1e-9)
        print(
            f"{self.done / 1e6:,.1f} of {self.total / 1e6:,.1f} MB  {self.tokens / 1e6:,.2f} M tokens  "
            f"{rate / 1e6:.1f} MB/s  {left:.0f} s left",
            flush=True,
        )


def prepare(args: argparse.Namespace) -> None:
    """Make the data set that the options describe. Raises DataError; a failure leaves nothing behind."""
    options = {k: v for k, v in vars(args).items() if k not in ("workers", "output")}
    target = Path(args.output)
    if target.exists():
        if (target / "manifest.json").exists() and read_manifest(target).made_with == options:
            print(f"{target} is already prepared with these options")
            return
        raise DataError("output", target, "exists and was not made with these options", "choose another --output")
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        _fill(args, options, temporary)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(args: argparse.Namespace, options: dict[str, Any], directory: Path) -> None:
    limit = None if args.limit_mb is None else int(args.limit_mb * 1e6)

    def texts() -> Iterator[Document]:
        return documents(args.input, args.include, args.field, limit)

    total = sum(d.size for d in texts())
    if not total:
        raise DataError("input", " ".join(args.input), "holds no text", "give text, or another --include")
    ranks = _ranks(args.tokenizer, texts(), directory)
    encoding = tokenizer.load(args.tokenizer, ranks)
    shards = max(1, round(total / BYTES_A_TOKEN / args.shard_tokens))
    spill, progress = Spill(directory, shards, args.val_fraction, args.seed), Progress(total)
    for size, batch in encoded(texts(), args.tokenizer, ranks, args.workers):
        spill.add(batch)
        progress.add(size, sum(len(tokens) for _, tokens in batch))
    progress.show()
    dtype = "uint16" if encoding.n_vocab <= 1 << 16 else "uint32"
    splits = spill.drain(dtype)
    if not splits["train"]:
        raise DataError(
            "input", " ".join(args.input), "leaves nothing to train on", "give more, or less --val-fraction"
        )
    described = {
        "name": args.tokenizer,
        "fingerprint": tokenizer.fingerprint(encoding),
        "vocab_size": encoding.n_vocab,
        "end": encoding.eot_token,
        "ranks": Path(ranks).name if ranks else None,
    }
    write_manifest(directory, described, dtype, splits, options)
    for name, entries in splits.items():
        counts = sum(e.documents for e in entries), sum(e.tokens for e in entries)
        print(f"{name}: {len(entries)} shards, {counts[0]:,} documents, {counts[1]:,} tokens")


def _ranks(spec: str, texts: Iterator[Document], directory: Path) -> Optional[str]:
    """The rank file, beside the shards, of a tokenizer given by path or to be trained (bpe:SIZE); None for a name."""
    if spec in tokenizer.NAMES:
        return None
    path = directory / "tokenizer.tiktoken"
    if spec.startswith("bpe:") and spec[4:].isdecimal():
        print(f"training a vocabulary of {spec[4:]} tokens", flush=True)
        tokenizer.save(tokenizer.train(_sample(texts), int(spec[4:])), path)
    elif Path(spec).is_file():
        shutil.copyfile(spec, path)
    else:
        known = ", ".join(tokenizer.NAMES)
        raise DataError("tokenizer", spec, "not known", f"give {known}, bpe:SIZE, or the path of a rank file")
    return str(path)


def _sample(texts: Iterator[Document]) -> Iterator[str]:
    left = SAMPLE
    for document in texts:
        if left <= 0:
            return
        text = document.read()
        left -= len(text)
        yield text


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("--input", nargs="+", required=True, help="files, directories, .jsonl(.gz), or stdlib")
    parser.add_argument("--output", required=True, help="directory to make")
    parser.add_argument(
        "--tokenizer", default="bpe:8192", help="gpt2, cl100k_base, o200k_base, bpe:SIZE or a rank file"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenize")
    parser.add_argument("--include", default="*", help="pattern of the file names taken from directories")
    parser.add_argument("--field", default="text", help="field of a .jsonl line that has the text")
    parser.add_argument("--limit-mb", type=float, help="take about this much of the files")
    parser.add_argument("--val-fraction", type=float, default=0.02, help="share of documents to hold out")
    parser.add_argument("--shard-tokens", type=int, default=32 << 20, help="tokens of a shard, about")
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents")
    try:
        prepare(parser.parse_args(argv))
    except RunError as e:
        print(e, file=sys.stderr)
        return e.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
