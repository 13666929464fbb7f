"""python -m data.bench: rows per CPU-second beside a raw read of the same bytes and plain webdataset, in one run.

Rows come with labels, positions and cu_seqlens, every page compared with its checksum. Figures are per CPU-second (all
threads), the best and the median of a few passes, files in the page cache; each subject runs in a process of its own.
"""

import json
import multiprocessing
import pickle
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from configs.errors import ConfigError
from configs.options import Options, number, place, write
from configs.schema import LongDocuments
from data import command, documents, tokenizer
from data.documents import Odd, Portion, Span, find
from data.loader import Loader
from data.prepare import encode
from data.shards import ShardEntry, write_manifest, write_shard
from data.spill import Runs

END = 50256
TOKENIZER = {"name": "synthetic", "fingerprint": "synthetic", "vocab_size": END + 1, "end": END, "ranks": None}
FAR = 10**6  # the step to restore at
MANY = 100_000  # shards of the large manifest
WHOLE = 32 << 20  # tokens of a full shard


def make_corpus(directory: Path, tokens: int, shard_tokens: int) -> None:
    """Random documents with web-like lengths (log-normal, mean about 700), and the same ones a tar member each."""
    rng, entries = np.random.default_rng(0), []
    for i in range(max(1, tokens // shard_tokens)):
        lengths = np.maximum(2, rng.lognormal(6.0, 1.05, shard_tokens // 700)).astype(int)
        documents = [np.append(rng.integers(0, END, n - 1, dtype=np.uint16), np.uint16(END)) for n in lengths]
        entries.append(write_shard(directory / f"train-{i:06d}.tar", documents, "uint16"))
        with open(directory / f"plain-{i:06d}.tar", "wb") as f, webdataset.TarWriter(f, encoder=False, mtime=0) as tar:
            for j, document in enumerate(documents):
                tar.write({"__key__": f"{i:06d}-{j:07d}", "tok.bin": document.tobytes()})
    write_manifest(directory, TOKENIZER, "uint16", {"train": entries}, {})


def make_large(directory: Path) -> None:
    """The manifest of 100,000 full shards that all have the contents of one small file."""
    documents = [np.append(np.arange(699, dtype=np.uint16), np.uint16(END))] * (WHOLE // 700)
    entry = write_shard(directory / "train-000000.tar", documents, "uint16")
    for i in range(1, 64):  # those that the first windows may hold are found where they are looked for
        for kind in ("tar", "idx"):
            (directory / f"train-{i:06d}.{kind}").symlink_to(f"train-000000.{kind}")
    names = [f"train-{i % 64:06d}.tar" for i in range(MANY)]
    shards = [ShardEntry(n, entry.bytes, entry.sha256, entry.samples, entry.documents, entry.tokens) for n in names]
    write_manifest(directory, TOKENIZER, "uint16", {"train": shards}, {})


def rates(work: Callable[[], int], passes: int) -> tuple[float, float]:
    """Best and median tokens per CPU-second."""
    found = []
    for _ in range(passes):
        start = time.process_time()
        tokens = work()
        found.append(tokens / (time.process_time() - start))
    return max(found), sorted(found)[len(found) // 2]


def loader_rates(directory: str, seq_len: int, how: LongDocuments, passes: int) -> dict[str, Any]:
    """An epoch from a loader that has read nothing yet, again for each pass."""
    batch = max(1, 65536 // seq_len)

    def epoch() -> int:
        loader, tokens = Loader(directory, "train", seq_len, batch, batch, seed=0, long_documents=how), 0
        for _ in range(loader.total // batch):
            for made in loader.next_step():
                tokens += made.labels.numel() - made.padding
                assert made.positions.shape == made.tokens.shape
                assert made.cu_seqlens[-1] == made.tokens.numel()
        return tokens

    best, median = rates(epoch, passes)
    loader, padding = Loader(directory, "train", seq_len, 1, 1, seed=0, long_documents=how), 0
    for _ in range(loader.total):
        padding += loader.next_step()[0].padding
    return {"best": best, "median": median, "padding": padding / (loader.total * seq_len)}


def raw_rates(directory: str, passes: int) -> dict[str, Any]:
    """The ceiling: the bytes of the shards by read(), nothing made of them."""
    files = sorted(Path(directory).glob("train-*.tar"))

    def read() -> int:
        buffer, total = bytearray(1 << 20), 0
        for path in files:
            with open(path, "rb", buffering=0) as f:
                while got := f.readinto(buffer):
                    total += got
        return total // 2

    best, median = rates(read, passes)
    return {"best": best, "median": median}


def webdataset_rates(directory: str, passes: int) -> dict[str, Any]:
    """Plain webdataset on the same documents, a sample each; neither packed nor labelled nor checked."""
    urls = [str(p) for p in sorted(Path(directory).glob("plain-*.tar"))]

    def read() -> int:
        data = webdataset.WebDataset(urls, shardshuffle=False)
        return sum(len(np.frombuffer(s["tok.bin"], np.uint16).astype(np.int64)) for s in data)

    best, median = rates(read, passes)
    return {"best": best, "median": median}


def tokenizing(directory: str, passes: int) -> dict[str, Any]:
    """A .jsonl file to tokens on disk, as a worker and the main process do it; and tiktoken on the same lines."""
    path, ranks = Path(directory, "text.jsonl"), Path(directory, "ranks.tiktoken")
    sources = [Span(p, 0, p.stat().st_size) for p in find(["stdlib"], "*", 16 << 20)]
    texts = [t for t, _ in documents.texts(Portion(parts=sources), "", Odd())]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    tokenizer.save(tokenizer.train(texts, 8192), ranks)
    encoding, portions = tokenizer.load("", str(ranks)), list(documents.portions([path], "text"))
    options = {"tokenizer": "", "field": "text", "seed": 0}

    def ours() -> int:
        parts = [pickle.loads(pickle.dumps(encode(options, str(ranks), "uint16", p)[0])) for p in portions]
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            Runs(Path(folder), "uint16").write(parts, {})
        return sum(len(p.tokens) for p in parts)

    def bare() -> int:
        with open(path, "rb") as lines:
            return sum(len(encoding.encode_ordinary(json.loads(line)["text"])) for line in lines)

    out: dict[str, Any] = {}
    for name, work in (("ours", ours), ("tiktoken", bare)):
        work()
        out[name] = rates(work, passes)[0]
    return out


def start_and_restore(directory: str) -> dict[str, Any]:
    """Seconds to build a loader over 100,000 shards and have its first batch, and to go on at a far step."""
    out: dict[str, Any] = {}
    imports, start = memory(), time.perf_counter()
    loader = Loader(directory, "train", 4096, 64, 8, seed=0)
    out["start"] = time.perf_counter() - start
    start = time.perf_counter()
    loader.next_step()
    out["first_batch"] = time.perf_counter() - start
    for step in (1, 10**3, FAR, 10**9):
        start = time.perf_counter()
        loader.load_state_dict({**loader.state_dict(), "consumed_rows": step * 64})
        loader._place(step * 64)
        out[f"restore_{step}"] = time.perf_counter() - start
    loader.reset()
    for _ in range(400):
        loader.next_step()
    return {**out, "memory": memory(), "imports": imports, "peak": memory("VmHWM")}


def memory(which: str = "VmRSS") -> int:
    """Resident bytes of this process, or the most it had (the resource module would count its parent's too)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """work(*args) in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, args)


def measure(tokens: int, shard_tokens: int, passes: int, folder: str | None) -> dict[str, Any]:
    """All figures; tokens per CPU-second, seconds, bytes."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        small, large = Path(temporary, "small"), Path(temporary, "large")
        small.mkdir()
        large.mkdir()
        make_corpus(small, tokens, shard_tokens)
        make_large(large)
        out: dict[str, Any] = {"raw read": alone(raw_rates, str(small), passes)}
        out["webdataset, a document a sample"] = alone(webdataset_rates, str(small), 1)
        for seq_len in (1024, 4096, 16384, 65536):
            out[f"rows of {seq_len}"] = alone(loader_rates, str(small), seq_len, LongDocuments.carry, passes)
        out["rows of 4096, long documents cut"] = alone(loader_rates, str(small), 4096, LongDocuments.cut, passes)
        out["tokenizing"] = alone(tokenizing, temporary, passes)
        out["100,000 shards"] = alone(start_and_restore, str(large))
    versions = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    return {**out, "environment": {**versions, "webdataset": webdataset.__version__, "machine": platform.machine()}}


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    for name, f in figures.items():
        if "best" in f:
            padding = f"  padding {100 * f['padding']:.3f}%" if "padding" in f else ""
            print(f"{name:34} {f['best'] / 1e6:8.1f} M tokens/CPU-s  (median {f['median'] / 1e6:.1f}){padding}")
    own, bare = figures["tokenizing"]["ours"], figures["tokenizing"]["tiktoken"]
    print(f"{'tokenizing .jsonl to disk':34} {own / 1e6:8.2f} M tokens/CPU-s, {own / bare:.0%} of tiktoken alone")
    large = figures["100,000 shards"]
    restores = "; ".join(f"{large[f'restore_{step}']:.3f} s" for step in (1, FAR, 10**9))
    mib = [f"{large[key] / 2**20:.0f} MiB" for key in ("memory", "peak", "imports")]
    print(f"{'start with 100,000 shards':34} {large['start']:.3f} s, first batch {large['first_batch']:.3f} s more")
    print(f"{'restore at step 1; 1e6; 1e9':34} {restores}")
    print(f"{'resident memory':34} {mib[0]}, peak {mib[1]}, of which {mib[2]} are imports (torch)")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    p = Options("python -m data.bench", (__doc__ or "").splitlines()[0])
    p.add_argument("--tokens", type=number(int, 1), default=64 << 20, help="of the synthetic corpus")
    p.add_argument("--shard-tokens", type=number(int, 1000), default=8 << 20, help="of its shards")
    p.add_argument("--passes", type=number(int, 1), default=3, help="over each subject")
    p.add_argument("--directory", help="where to make the corpus (default: the system's temporary one)")
    p.add_argument("--json", type=place, help="write the figures there")

    def work() -> None:
        args = p.parse_args(argv)
        if args.directory and not Path(args.directory).is_dir():
            raise ConfigError("option", f"--directory {args.directory}", "is no directory", "give one that is there")
        figures = measure(args.tokens, args.shard_tokens, args.passes, args.directory)
        show(figures)
        if args.json:
            write("--json", args.json, json.dumps(figures, indent=1) + "\n")

    return command.run(work)


if __name__ == "__main__":
    sys.exit(main())
