"""python -m data.prepare: documents in, WebDataset shards of tokens out.

The output depends on the input and the options only, whatever the number of workers. It is made in OUTPUT.part and
renamed when it is whole; the same command goes on where an earlier one was interrupted. Memory: a shard a worker.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Optional

import numpy as np

from configs.errors import DataError, RunError
from configs.options import Options, filled, number
from data import command, documents, index, tokenizer
from data.documents import Odd, Portion
from data.shards import ShardEntry, describe, read_manifest, write_manifest, write_shard
from data.spill import RUN, SPACE, Encoded, Runs, key

SAMPLE = 32 << 20  # letters of text that a vocabulary is trained on
PLAN = "plan.json"  # in OUTPUT.part: the options, and which input they were given


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    p = Options("python -m data.prepare", (__doc__ or "").splitlines()[0])
    p.add_argument("--input", nargs="+", type=filled, required=True, help="files and directories (text, source "
                   "trees, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), or stdlib")  # fmt: skip
    p.add_argument("--output", type=filled, required=True, help="directory to make")
    p.add_argument("--tokenizer", default="bpe:8192", help="gpt2, cl100k_base, o200k_base, bpe:SIZE or a rank file")
    p.add_argument("--workers", type=number(int, 1), default=os.cpu_count() or 1, help="processes that tokenize")
    p.add_argument("--include", default="*", help="pattern of the file names taken from directories")
    p.add_argument("--field", default="text", help="field of a .jsonl line, or column of .parquet, that has the text")
    p.add_argument("--limit-mb", type=number(float, 0), help="take about this much of the files")
    p.add_argument("--val-fraction", type=number(float, 0, 1), default=0.02, help="share of documents to hold out")
    p.add_argument("--shard-tokens", type=number(int, 1), default=32 << 20, help="tokens of a shard, about")
    p.add_argument("--drop-duplicates", action="store_true", help="keep one of each set of equal documents")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the order of documents")

    def work() -> None:
        args = vars(p.parse_args(argv))
        output, workers = Path(args.pop("output")), args.pop("workers")
        with _stoppable():
            prepare(output, args, workers)

    return command.run(work)


def prepare(output: Path, options: dict[str, Any], workers: int) -> None:
    """Make the data set that the options describe. Raises RunError; what was read by then is kept."""
    if output.exists():
        if (output / "manifest.json").exists() and read_manifest(output).made_with == options:
            print(f"{output} is already prepared with these options")
            return
        raise DataError("output", output, "exists and was not made with these options", "choose another --output")
    limit = None if options["limit_mb"] is None else int(options["limit_mb"] * 1e6)
    paths = documents.find(options["input"], options["include"], limit)
    part = output.with_name(output.name + ".part")
    try:
        with _claimed(part, options, paths):
            if not (part / "manifest.json").exists():
                fill(part, options, paths, workers)
            for path in [*part.glob("run-*"), *part.glob("*.tmp"), part / PLAN]:
                path.unlink(missing_ok=True)
            os.rename(part, output)
    except OSError as e:
        why = f"cannot be written ({e.strerror or e})"
        raise DataError("output", e.filename or part, why, "give it space and permission, and start again") from e
    except BrokenProcessPool as e:
        why = "was killed, maybe for want of memory"
        raise RunError("worker", "process", why, "start again with fewer --workers") from e


def encode(options: dict[str, Any], ranks: Optional[str], dtype: str, portion: Portion) -> tuple[Encoded, Odd]:
    """Tokenize a portion of the input. Raises DataError."""
    encoding, odd = tokenizer.load(options["tokenizer"], ranks), Odd()
    keys, lengths, tokens = [], [], []
    end = np.array([encoding.eot_token], dtype)
    for text, raw in documents.texts(portion, options["field"], odd):
        found = encoding.encode_to_numpy(text, disallowed_special=())
        keys.append(key(raw, options["seed"]))
        lengths.append(len(found) + 1)
        tokens += (found, end)
    table = np.frombuffer(b"".join(keys), ">u8").astype(np.uint64).reshape(-1, 2)
    joined = np.concatenate(tokens, dtype=dtype, casting="unsafe") if tokens else np.empty(0, dtype)
    return Encoded(table, np.array(lengths, np.int64), joined), odd


def tokenize(pool: ProcessPoolExecutor, work: Callable, portions: Iterator[Portion], total: int, runs: Runs) -> Odd:
    """Spill the tokens of the portions that no run has yet; returns what was odd in all. `total` is in bytes."""
    done, size = runs.state.get("portions", 0), runs.state.get("bytes", 0)
    odd, parts, held = Odd(**runs.state.get("odd", {})), [], 0
    progress = command.Progress("tokenizing", "MB", total / 1e6, size / 1e6)
    for portion, (made, strange) in ordered(pool, work, islice(portions, done, None)):
        parts.append(made)
        odd.add(strange)
        done, size, held = done + 1, size + portion.size, held + made.tokens.nbytes
        if held >= RUN:
            runs.write(parts, {"portions": done, "bytes": size, "odd": vars(odd)})
            parts, held = [], 0
        progress.show(size / 1e6)
    if held:
        runs.write(parts, {"portions": done, "bytes": size, "odd": vars(odd)})
    progress.end(size / 1e6)
    return odd


def write(directory: Path, dtype: str, unique: bool, shard: tuple[str, int, int]) -> Optional[ShardEntry]:
    """Write one of the planned shards, if anything belongs into it and it is not there."""
    path, (_, low, high) = directory / shard[0], shard
    if path.exists():
        return describe(path, index.build(path), dtype)
    texts = Runs(directory, dtype).read(low, high, unique)
    return write_shard(path, texts, dtype) if texts else None


def plan(runs: Runs, val_fraction: float, shard_tokens: int) -> list[tuple[str, int, int]]:
    """(path, low, high) of each shard to be: its documents are those with hashes in [low, high)."""
    held_out, out = round(val_fraction * SPACE), []
    for split, low, high in (("train", held_out, SPACE), ("val", 0, held_out)):
        count = max(1, round(runs.tokens(low, high) / shard_tokens))
        edges = [low + (high - low) * i // count for i in range(count + 1)]
        out += [(f"{split}-{i:06d}.tar", edges[i], edges[i + 1]) for i in range(count)]
    return out


def ordered(pool: ProcessPoolExecutor, work: Callable, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(item, work(item)) in order, with few of them under way."""
    waiting: deque[tuple[Any, Future]] = deque()
    for item in items:
        waiting.append((item, pool.submit(work, item)))
        if len(waiting) > 3 * pool._max_workers:
            item, future = waiting.popleft()
            yield item, future.result()
    for item, future in waiting:
        yield item, future.result()


def fill(directory: Path, options: dict[str, Any], paths: list[Path], workers: int) -> None:
    """Everything of a data set, with its manifest last."""
    total, name = sum(p.stat().st_size for p in paths), " ".join(options["input"])
    if not total:
        raise DataError("input", name, "holds no text", "give text, or another --include")
    ranks = _ranks(options, paths, directory)
    encoding = tokenizer.load(options["tokenizer"], ranks)
    dtype = "uint16" if encoding.n_vocab <= 1 << 16 else "uint32"
    runs = Runs(directory, dtype)
    with _pool(workers) as pool:
        portions = documents.portions(paths, options["field"])
        odd = tokenize(pool, partial(encode, options, ranks, dtype), portions, total, runs)
        planned = plan(runs, options["val_fraction"], options["shard_tokens"])
        splits = _write_all(pool, partial(write, directory, dtype, options["drop_duplicates"]), planned)
    if not splits["train"]:
        raise DataError("input", name, "leaves nothing to train on", "give more text, or less --val-fraction")
    described = {
        "name": options["tokenizer"],
        "fingerprint": tokenizer.fingerprint(encoding),
        "vocab_size": encoding.n_vocab,
        "end": encoding.eot_token,
        "ranks": Path(ranks).name if ranks else None,
    }
    write_manifest(directory, described, dtype, splits, options)
    _report(splits, runs, odd)


def _write_all(
    pool: ProcessPoolExecutor, work: Callable, planned: list[tuple[str, int, int]]
) -> dict[str, list[ShardEntry]]:
    splits: dict[str, list[ShardEntry]] = {"train": [], "val": []}
    progress = command.Progress("writing", "shards", len(planned))
    for done, ((path, _, _), entry) in enumerate(ordered(pool, work, planned), 1):
        if entry:
            splits[path.split("-")[0]].append(entry)
        progress.show(done)
    progress.end(len(planned))
    return splits


def _report(splits: dict[str, list[ShardEntry]], runs: Runs, odd: Odd) -> None:
    written = 0
    for name, entries in splits.items():
        counts = sum(e.documents for e in entries), sum(e.tokens for e in entries)
        print(f"{name}: {len(entries)} shards, {counts[0]:,} documents, {counts[1]:,} tokens")
        written += counts[0]
    print(f"left out: {odd.empty:,} empty documents, {odd.binary:,} binary, {runs.documents - written:,} duplicate")
    if odd.repaired:
        print(f"repaired: {odd.repaired:,} documents that were no UTF-8")


def _ranks(options: dict[str, Any], paths: list[Path], directory: Path) -> Optional[str]:
    """The rank file, beside the shards, of a tokenizer given by path or to be trained (bpe:SIZE); None for a name."""
    spec, path = options["tokenizer"], directory / "tokenizer.tiktoken"
    if spec in tokenizer.NAMES:
        return None
    made = path.with_suffix(".tmp")
    if path.exists():
        return str(path)
    if spec.startswith("bpe:") and spec[4:].isdecimal():
        print(f"training a vocabulary of {spec[4:]} tokens", flush=True)
        tokenizer.save(tokenizer.train(_sample(paths, options["field"]), int(spec[4:])), made)
    elif Path(spec).is_file():
        shutil.copyfile(spec, made)
    else:
        known = ", ".join(tokenizer.NAMES)
        raise DataError("tokenizer", spec, "not known", f"give {known}, bpe:SIZE, or the path of a rank file")
    os.rename(made, path)
    return str(path)


def _sample(paths: list[Path], field: str) -> Iterator[str]:
    left = SAMPLE
    for portion in documents.portions(paths, field):
        for text, _ in documents.texts(portion, field, Odd()):
            yield text
            left -= len(text)
        if left <= 0:
            return


@contextmanager
def _claimed(directory: Path, options: dict[str, Any], paths: list[Path]) -> Iterator[None]:
    """The directory that is filled, for this process alone. It is removed after a mistake in the input or the options,
    whose cure makes it useless, and kept after an interruption, once something was read.
    """
    stats = [(str(p), s.st_size, s.st_mtime_ns) for p, s in ((p, p.stat()) for p in paths)]
    said = {"options": options, "input": hashlib.sha256(json.dumps(stats).encode()).hexdigest()}
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise DataError("output", directory, "is being filled by another process", "let it end") from e
        plan_file = directory / PLAN
        if plan_file.exists() and json.loads(plan_file.read_text()) != said:
            why = "was begun with other options, or the input has changed"
            raise DataError("output", directory, why, "remove it, or give what it was begun with")
        plan_file.write_text(json.dumps(said))
        try:
            yield
        except BaseException as e:
            mistake = isinstance(e, DataError) and not isinstance(e.__cause__, OSError)
            if mistake or not (directory / "run-000000.json").exists():
                shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        os.close(handle)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, however it ends."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the main process ends the others
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
