"""python -m data.inspect DIR: what a prepared data set holds; decode a document, verify every hash."""

import argparse
import sys
from pathlib import Path
from typing import Optional

import numpy as np

from configs.errors import DataError, RunError
from data.shards import Manifest, Shard, read_manifest
from data.tokenizer import load


def describe(manifest: Manifest, verify: bool) -> None:
    """Print counts and document lengths of each split, opening every shard."""
    t = manifest.tokenizer
    print(f"{manifest.directory}: tokenizer {t['name']} ({t['vocab_size']} tokens), {manifest.dtype}")
    print(f"fingerprint {manifest.fingerprint}")
    for name, entries in manifest.splits.items():
        shards = [Shard(manifest.directory, e, manifest.dtype, verify) for e in entries]
        lengths = np.concatenate([np.diff(np.append(s.starts, len(s))) for s in shards] or [np.zeros(0, int)])
        print(f"{name}: {len(shards)} shards, {len(lengths):,} documents, {int(lengths.sum()):,} tokens")
        if len(lengths):
            points = np.percentile(lengths, (0, 10, 50, 90, 99, 100)).astype(int)
            print("  tokens a document: " + "  ".join(f"{p} {v:,}" for p, v in zip(PERCENTILES, points)))
    if verify:
        print("every hash matches")


PERCENTILES = ("least", "10%", "median", "90%", "99%", "most")


def decode(manifest: Manifest, split: str, index: int) -> str:
    """The text of document `index` of a split. Raises DataError if there is none."""
    for entry in manifest.splits.get(split, []):
        if index < entry.documents:
            shard = Shard(manifest.directory, entry, manifest.dtype, verify=False)
            ends = np.append(shard.starts, len(shard))
            ranks = manifest.tokenizer["ranks"]
            encoding = load(manifest.tokenizer["name"], ranks and str(manifest.directory / ranks))
            return encoding.decode(shard.read(int(ends[index]), int(ends[index + 1]) - 1).tolist())
        index -= entry.documents
    raise DataError("document", f"{split} {index}", "beyond the last one", "give a smaller --document")


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    parser = argparse.ArgumentParser(prog="python -m data.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--document", type=int, help="print the text of this one")
    parser.add_argument("--split", default="train")
    parser.add_argument("--verify", action="store_true", help="compare every hash")
    args = parser.parse_args(argv)
    try:
        manifest = read_manifest(args.directory)
        if args.document is not None:
            print(decode(manifest, args.split, args.document))
        else:
            describe(manifest, args.verify)
    except RunError as e:
        print(e, file=sys.stderr)
        return e.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
