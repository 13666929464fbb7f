"""python -m data.inspect DIR: what a prepared data set holds; decode a document, verify every hash; a run's batches."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import numpy as np

from configs.errors import DataError
from configs.options import Options, number, place
from data import batches, command
from data.shards import Manifest, Shard, ShardEntry, read_manifest
from data.tokenizer import load

PERCENTILES = {"least": 0, "10%": 10, "median": 50, "90%": 90, "99%": 99, "most": 100}


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    p = Options("python -m data.inspect", (__doc__ or "").splitlines()[0])
    p.add_argument("directory", type=place, help="of a data set, or with --batch of a run")
    p.add_argument("--batch", type=number(int, 1), metavar="STEP", help="print what this step was trained on")
    p.add_argument("--document", type=number(int, 0), help="print the text of this one, counted from 0")
    p.add_argument("--split", default="train", help="that the document is of")
    p.add_argument("--histogram", type=place, help="where to draw the lengths (default: DIR/lengths.png)")
    p.add_argument("--verify", action="store_true", help="compare every hash")

    def work() -> None:
        args = p.parse_args(argv)
        if args.batch is not None:
            batches.show(args.directory, args.batch)
            return
        manifest = read_manifest(args.directory)
        if args.document is not None:
            print(decode(manifest, args.split, args.document))
            return
        if args.verify:
            verify(manifest)
        draw(describe(manifest), args.histogram or args.directory / "lengths.png")

    return command.run(work)


def describe(manifest: Manifest) -> dict[str, np.ndarray]:
    """Print counts and document lengths of each split; returns the lengths. Raises DataError for a damaged shard."""
    t = manifest.tokenizer
    print(f"{manifest.directory}: tokenizer {t['name']} ({t['vocab_size']:,} tokens), {manifest.dtype}")
    print(f"fingerprint {manifest.fingerprint}")
    out = {}
    for name, entries in manifest.splits.items():
        found = [np.diff(np.append(s.starts, len(s))).astype(np.int32) for s in _shards(manifest, name)]
        lengths = out[name] = np.concatenate([*found, np.zeros(0, np.int32)])
        size = sum(e.bytes for e in entries)
        print(f"{name}: {len(entries):,} shards, {size:,} bytes, {len(lengths):,} documents, {lengths.sum():,} tokens")
        if len(lengths):
            points = zip(PERCENTILES, np.percentile(lengths, list(PERCENTILES.values())).astype(int))
            said = "  ".join(f"{p} {v:,}" for p, v in points)
            print(f"  tokens a document: {said}  mean {lengths.mean():,.0f}")
    return out


def _shards(manifest: Manifest, split: str) -> Iterator[Shard]:
    """One after the other, so that few are open."""
    for entry in manifest.splits[split]:
        yield Shard(manifest.directory, entry, manifest.dtype)


def draw(lengths: dict[str, np.ndarray], path: Path) -> None:
    """A histogram of document lengths as PNG: how many documents, and how many tokens are in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    most = max((int(x.max()) for x in lengths.values() if len(x)), default=1)
    edges = 2 ** np.arange(0, np.log2(most) + 0.5, 0.25)
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    for axis, weighted in zip(axes, (False, True)):
        for name, x in lengths.items():
            if len(x):
                axis.hist(x, edges, weights=x if weighted else None, histtype="step", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens a document", ylabel="tokens" if weighted else "documents")
        axis.legend()
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as e:
        raise DataError("histogram", path, f"cannot be written ({e.strerror})", "name another with --histogram") from e
    pyplot.close(figure)
    print(f"lengths drawn in {path}")


def verify(manifest: Manifest) -> None:
    """Compare every shard with its hash and print those that differ. Raises DataError if there are any."""
    entries = [e for shards in manifest.splits.values() for e in shards]
    progress, done, bad = command.Progress("verifying", "MB", sum(e.bytes for e in entries) / 1e6), 0.0, 0
    for entry in entries:
        fault = _fault(manifest, entry)
        if fault:
            print(fault, file=sys.stderr)
            bad += 1
        done += entry.bytes / 1e6
        progress.show(done)
    progress.end(done)
    if bad:
        why = f"{bad} of {len(entries)} shards are damaged"
        raise DataError("data", manifest.directory, why, "restore them, or prepare the data again")
    print("every hash matches")


def _fault(manifest: Manifest, entry: ShardEntry) -> Optional[DataError]:
    try:
        Shard(manifest.directory, entry, manifest.dtype, verify=True)
    except DataError as e:
        return e
    return None


def decode(manifest: Manifest, split: str, index: int) -> str:
    """The text of document `index` of a split. Raises DataError if there is none."""
    entries = manifest.splits.get(split, [])
    for entry in entries:
        if index < entry.documents:
            shard = Shard(manifest.directory, entry, manifest.dtype)
            ends = np.append(shard.starts, len(shard))
            ranks = manifest.tokenizer["ranks"]
            encoding = load(manifest.tokenizer["name"], ranks and str(Path(manifest.directory, ranks)))
            return encoding.decode(shard.read(int(ends[index]), int(ends[index + 1]) - 1).tolist())
        index -= entry.documents
    count = sum(e.documents for e in entries)
    raise DataError("document", f"{split} {count + index}", f"there are {count:,}", "give a smaller --document")


if __name__ == "__main__":
    sys.exit(main())
