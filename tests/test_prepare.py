"""Preparing data as a user does: same bytes for any number of workers, nothing half-made, mistakes in one line."""

import errno
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from data import documents, inspect, prepare, tokenizer
from data.shards import Shard, read_manifest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sources(tmp_path, texts) -> Path:
    folder = tmp_path / "sources"
    for i, text in enumerate(texts[:60]):
        path = folder / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\x7fELF\0\0\1")
    (folder / "latin.txt").write_bytes("caf\xe9 <|endoftext|> ok".encode("latin-1"))
    return folder


def run(*options: object) -> int:
    return prepare.main([str(o) for o in options])


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def decoded(path: Path) -> list[str]:
    manifest = read_manifest(path)
    encoding = tokenizer.load("", str(path / manifest.tokenizer["ranks"]))
    out = []
    for entry in (e for entries in manifest.splits.values() for e in entries):
        shard = Shard(path, entry, manifest.dtype, verify=True)
        ends = [*shard.starts.tolist(), len(shard)]
        for s, e in itertools.pairwise(ends):
            tokens = shard.read(s, e).tolist()
            assert tokens[-1] == manifest.tokenizer["end"]
            assert manifest.tokenizer["end"] not in tokens[:-1]
            out.append(encoding.decode(tokens[:-1]))
    return out


SMALL = ("--tokenizer", "bpe:400", "--shard-tokens", 1500, "--val-fraction", 0.2)


def test_every_document_is_there_once_whatever_the_workers(sources, tmp_path, texts):
    for workers in (1, 2):
        output = tmp_path / f"out{workers}"
        assert run("--input", sources, "--output", output, *SMALL, "--workers", workers) == 0
    assert digest(tmp_path / "out1") == digest(tmp_path / "out2")
    assert sorted(decoded(tmp_path / "out1")) == sorted([*texts[:60], "caf\ufffd <|endoftext|> ok"])
    assert len(read_manifest(tmp_path / "out1").splits["train"]) > 1
    assert read_manifest(tmp_path / "out1").splits["val"]


def test_again_with_the_same_options_does_nothing_and_with_others_is_refused(sources, tmp_path, capsys):
    output = tmp_path / "out"
    assert run("--input", sources, "--output", output, *SMALL) == 0
    before = digest(output)
    assert run("--input", sources, "--output", output, *SMALL) == 0
    assert "already prepared" in capsys.readouterr().out
    assert run("--input", sources, "--output", output, *SMALL, "--seed", 1) == 65
    assert "not made with these options" in capsys.readouterr().err
    assert digest(output) == before


def zst(data: bytes) -> bytes:
    """Two frames, as tools that compress in parallel write them."""
    half = len(data) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (data[:half], data[half:]))


def write_inputs(folder: Path, texts: list[str]) -> tuple[list[Path], list[str]]:
    """Every format, each with texts of its own; and all of these."""
    kinds = ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"]
    paths, expected = [folder / k for k in kinds], []
    for path in paths:
        made = [f"{path.name} {t}" for t in texts]
        lines = "".join(json.dumps({"body": t, "n": i}) + "\n" for i, t in enumerate(made)).encode()
        expected += made
        if path.suffix == ".parquet":
            parquet.write_table(pyarrow.table({"n": range(len(made)), "body": made}), path, row_group_size=7)
        else:
            path.write_bytes({".gz": gzip.compress, ".zst": zst}.get(path.suffix, bytes)(lines))
    return paths, expected


@pytest.mark.parametrize("portion", [1 << 20, 700])
def test_every_format_has_the_named_field(tmp_path, texts, monkeypatch, portion):
    monkeypatch.setattr("data.documents.PORTION", portion)
    paths, expected = write_inputs(tmp_path, [*texts[:30], "\u2028 naïve 日本語 🙂"])
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().rstrip() + b"\n\n")
    assert run("--input", *paths, "--output", tmp_path / "out", *SMALL, "--field", "body", "--workers", 1) == 0
    assert sorted(decoded(tmp_path / "out")) == sorted(expected)


@pytest.mark.parametrize("portion", [1, 100, 333, 5000])
def test_lines_are_read_once_wherever_a_file_is_parted(tmp_path, texts, monkeypatch, portion):
    """What workers do with the portions, without the workers: they would not see the small size."""
    monkeypatch.setattr("data.documents.PORTION", portion)
    paths, expected = write_inputs(tmp_path, [*texts[:20], "x" * 1000, "é" * 400])
    made = list(documents.portions(paths, "body"))
    odd = documents.Odd()
    assert [t for p in made for t, _ in documents.texts(p, "body", odd)] == expected
    assert sum(p.size for p in made) == sum(p.stat().st_size for p in paths)
    assert odd == documents.Odd()


@pytest.mark.parametrize("text", ["one line\n" * 40, "no lines, é and 🙂 " * 20, "\n" * 300, "🙂" * 100])
def test_a_long_text_is_parted_and_nothing_is_lost(tmp_path, monkeypatch, text):
    monkeypatch.setattr("data.documents.PIECE", 61)
    (tmp_path / "a.txt").write_text(text)
    odd = documents.Odd()
    parts = [t for p in documents.portions([tmp_path / "a.txt"], "") for t, _ in documents.texts(p, "", odd)]
    assert "".join(parts) == text
    assert len(parts) >= len(text.encode()) // 61 - 1
    assert odd.repaired == 0


def test_equal_documents_are_dropped_when_asked(sources, tmp_path, capsys):
    for i in range(5):
        shutil.copy(sources / "part1" / "1.txt", sources / f"again{i}.txt")
    assert run("--input", sources, "--output", tmp_path / "all", *SMALL) == 0
    assert ", 0 duplicate" in capsys.readouterr().out
    assert run("--input", sources, "--output", tmp_path / "once", *SMALL, "--drop-duplicates") == 0
    assert ", 5 duplicate" in capsys.readouterr().out
    every, once = decoded(tmp_path / "all"), decoded(tmp_path / "once")
    assert len(every) == len(once) + 5
    assert sorted(set(every)) == sorted(once)


def test_what_is_no_text_is_counted(sources, tmp_path, capsys):
    (sources / ".git").mkdir()
    (sources / ".git" / "HEAD").write_text("hidden")
    (sources / "halves.jsonl").write_text('{"text": "half \\ud83d letter"}\n{"text": null}\n{"text": ""}\n')
    assert run("--input", sources, "--output", tmp_path / "out", *SMALL) == 0
    said = capsys.readouterr().out
    assert "left out: 3 empty documents, 1 binary, 0 duplicate" in said
    assert "repaired: 2 documents" in said
    assert "half \ufffd letter" in decoded(tmp_path / "out")
    assert "hidden" not in decoded(tmp_path / "out")


@pytest.fixture
def broken(tmp_path, monkeypatch) -> Path:
    """The working directory, with files that are wrong in one way each."""
    lines = b'{"text": "fine"}\n' * 9 + b'{"txt": 1}\n'
    files = {
        "bad.jsonl": lines,
        "bad.jsonl.gz": gzip.compress(lines),
        "number.jsonl": b'{"text": 1}\n',
        "list.jsonl": b'["text"]\n',
        "deep.jsonl": b"[" * 100_000,
        "cut.jsonl.gz": gzip.compress(lines)[:-9],
        "cut.jsonl.zst": zst(lines)[:-9],
        "page.jsonl.zst": b"<html>503</html>",
        "bad.tiktoken": b"IQ== 0\nIg== 7\n",
        "ok.txt": b"some text " * 50,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    parquet.write_table(pyarrow.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    (tmp_path / "hollow").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = [  # options, exit code, what the line says
    ("--input absent", 65, "absent: no such file or directory"),
    ("--input hollow", 65, "holds no text"),
    ("--input bad.jsonl", 65, "bad.jsonl: line 10 is no object with a text in text (KeyError)"),
    ("--input bad.jsonl.gz", 65, "bad.jsonl.gz: line 10"),
    ("--input number.jsonl", 65, "number.jsonl: line 1"),
    ("--input list.jsonl", 65, "list.jsonl: line 1"),
    ("--input deep.jsonl", 65, "deep.jsonl: line 1"),
    ("--input cut.jsonl.gz", 65, "cut.jsonl.gz: cannot be read"),
    ("--input cut.jsonl.zst", 65, "cut.jsonl.zst: cannot be read"),
    ("--input page.jsonl.zst", 65, "page.jsonl.zst: cannot be read"),
    ("--input a.parquet", 65, "a.parquet: has no column text of texts, but n (int64), body (string)"),
    ("--input cut.parquet", 65, "cut.parquet: no sound parquet file"),
    ("--input ok.txt --tokenizer gpt5", 65, "not known"),
    ("--input ok.txt --tokenizer bad.tiktoken", 65, "have no rank"),
    ("--input ok.txt --tokenizer bpe:100", 65, "smaller than"),
    ("--input ok.txt --val-fraction 1.0", 65, "leaves nothing to train on"),
    ("--input ok.txt --val-fraction 2", 64, "--val-fraction: 2 is not within"),
    ("--input ok.txt --workers 0", 64, "--workers: 0 is not within"),
    ("--input ok.txt --seed x", 64, "--seed: invalid int value"),
    ("--input ok.txt --sheep x", 64, "unrecognized arguments"),
]


@pytest.mark.parametrize(("options", "code", "says"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line_and_leaves_nothing(broken, capsys, options, code, says):
    before = sorted(broken.iterdir())
    assert run("--output", "out", "--tokenizer", "bpe:300", *options.split()) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert sorted(broken.iterdir()) == before


def test_named_ranks_without_a_network_are_one_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    (tmp_path / "ok.txt").write_text("some text")
    assert run("--input", tmp_path / "ok.txt", "--output", tmp_path / "out", "--tokenizer", "o200k_base") == 65
    assert "TIKTOKEN_CACHE_DIR" in capsys.readouterr().err


KILLED = """
import signal, sys, data.spill as spill
from data import prepare
prepare.RUN = 200_000
save, count = spill._save, 0
def failing(*args):
    global count
    save(*args)
    count += 1
    if count == int(sys.argv[1]):
        signal.raise_signal(int(sys.argv[2]))
spill._save = failing
sys.exit(prepare.main(sys.argv[3:]))
"""


def limited(output: Path, *more: str) -> list[str]:
    options = "--input stdlib --limit-mb 4 --tokenizer bpe:300 --shard-tokens 400000 --include *.py --workers 2"
    return [*options.split(), "--output", str(output), *more]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert prepare.main(limited(output)) == 0
    return output


@pytest.mark.parametrize(
    ("file", "how"), [(2, signal.SIGKILL), (4, signal.SIGKILL), (6, signal.SIGKILL), (9, signal.SIGTERM)], ids=str
)
def test_interrupted_it_goes_on_and_gives_the_same_bytes(tmp_path, uninterrupted, monkeypatch, file, how):
    """Ended right after its n-th file of tokens (three make a run), then started again by the same command."""
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(file), str(int(how)), *limited(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (75 if how == signal.SIGTERM else -how), done.stderr
    assert not output.exists()
    runs = len(list(tmp_path.glob("out.part/run-*.json")))
    assert runs == file // 3
    read = json.loads((tmp_path / f"out.part/run-{runs - 1:06d}.json").read_text())["portions"] if runs else 0
    portions = len(list(documents.portions(documents.find(["stdlib"], "*.py", 4_000_000), "text")))
    todo, ordered = [], prepare.ordered
    monkeypatch.setattr(prepare, "ordered", lambda pool, work, items: ordered(pool, work, map(noted(todo), items)))
    assert prepare.main([*limited(output), "--workers", "1"]) == 0
    assert sum(isinstance(item, documents.Portion) for item in todo) == portions - read
    assert digest(output) == digest(uninterrupted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def noted(seen: list):
    return lambda item: seen.append(item) or item


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true) -> None:
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    assert true()


def test_killed_while_it_writes_shards_it_goes_on_and_its_workers_end(tmp_path):
    small = ["--shard-tokens", "8000"]
    assert prepare.main([*limited(tmp_path / "whole"), *small]) == 0
    command = [sys.executable, "-m", "data.prepare", *limited(tmp_path / "out"), *small]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: len(list(tmp_path.glob("out.part/*.tar"))) > 3)
        workers = children(process.pid)
        process.kill()
    assert len(workers) >= 2
    assert not (tmp_path / "out").exists()
    wait_until(lambda: not any(alive(pid) for pid in workers))
    assert prepare.main([*limited(tmp_path / "out"), *small]) == 0
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def workers_of(pid: int) -> list[int]:
    return [p for p in children(pid) if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()]


def test_a_worker_that_is_killed_ends_it_with_a_line_and_it_goes_on(tmp_path):
    small = ["--shard-tokens", "8000"]
    command = [sys.executable, "-m", "data.prepare", *limited(tmp_path / "out"), *small]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(workers_of(process.pid)) == 2)
        workers = workers_of(process.pid)
        os.kill(workers[-1], signal.SIGKILL)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 70
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "worker process: was killed" in line
    assert not any(alive(pid) for pid in workers)
    assert prepare.main([*limited(tmp_path / "out"), *small]) == 0


def test_what_was_begun_is_not_mixed_with_other_input_or_shared(sources, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.part/train-000000.tmp")

    files = ("--input", sources, "--output", tmp_path / "out", *SMALL, "--workers", 1)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "plan", full)
        assert run(*files) == 65
    assert "out.part/train-000000.tmp: cannot be written (No space left on device)" in capsys.readouterr().err
    assert run(*files, "--drop-duplicates") == 65
    assert "was begun with other options" in capsys.readouterr().err
    handle = os.open(tmp_path / "out.part", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run(*files) == 65
    assert "is being filled by another process" in capsys.readouterr().err
    os.close(handle)
    (sources / "late.txt").write_text("one more")
    assert run(*files) == 65
    assert "or the input has changed" in capsys.readouterr().err
    (sources / "late.txt").unlink()
    assert run(*files) == 0


def test_inspect_counts_draws_and_decodes(corpus, tmp_path, capsys):
    picture = tmp_path / "lengths.png"
    assert inspect.main([corpus, "--histogram", str(picture)]) == 0
    out, manifest = capsys.readouterr().out, read_manifest(corpus)
    every = decoded(Path(corpus))
    for name, entries in manifest.splits.items():
        counts = sum(e.documents for e in entries), sum(e.tokens for e in entries)
        assert f"documents, {counts[1]:,} tokens" in out
        assert f"{name}: {len(entries):,} shards" in out
        assert f"{counts[0]:,} documents" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    count = sum(e.documents for e in manifest.splits["train"])
    for split, index, expected in (
        ("train", 0, every[0]),
        ("train", count - 1, every[count - 1]),
        ("val", 0, every[count]),
    ):
        assert inspect.main([corpus, "--document", str(index), "--split", split]) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_inspect_verifies_every_hash(corpus, tmp_path, capsys):
    data = Path(shutil.copytree(corpus, tmp_path / "data"))
    assert inspect.main([str(data), "--verify"]) == 0
    assert "every hash matches" in capsys.readouterr().out
    bad = [read_manifest(data).splits[split][0].path for split in ("train", "val")]
    for name in bad:
        raw = bytearray((data / name).read_bytes())
        raw[-1] ^= 1
        (data / name).write_bytes(raw)
    assert inspect.main([str(data), "--verify"]) == 65
    error = capsys.readouterr().err
    assert all(f"{name}: does not match its hash" in error for name in bad)
    assert f"2 of {sum(map(len, read_manifest(data).splits.values()))} shards are damaged" in error


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--document", "1000000"], 65, "document train 1000000: there are "),
        (["--document", "-1"], 64, "--document: -1 is not within"),
        (["--split", "test", "--document", "0"], 65, "document test 0: there are 0"),
        (["--histogram", "absent/x.png"], 65, "absent/x.png: cannot be written"),
    ],
    ids=str,
)
def test_inspect_says_what_is_wrong(corpus, capsys, options, code, says):
    assert inspect.main([corpus, *options]) == code
    assert says in capsys.readouterr().err


def test_inspect_of_nothing(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "absent")]) == 65
    assert "no manifest.json there; make it with python -m data.prepare" in capsys.readouterr().err


MEMORY = """
import sys
from pathlib import Path
from data import prepare
prepare.RUN = 1 << 20
assert prepare.main(sys.argv[1:]) == 0
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_input(tmp_path, texts):
    line, peaks = "".join(json.dumps({"text": t}) + "\n" for t in texts), []
    for size in (1, 13):
        (tmp_path / f"{size}.jsonl").write_text(line * (size * 10**6 // len(line)))
        files = ["--input", str(tmp_path / f"{size}.jsonl"), "--output", str(tmp_path / f"out{size}")]
        options = ["--tokenizer", "bpe:300", "--shard-tokens", "2000000", "--workers", "1"]
        command = [sys.executable, "-c", MEMORY, *files, *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 6, "MiB, for 12 MB more of text"


def test_held_out_documents_are_a_share_and_never_in_training(corpus, texts):
    manifest = read_manifest(corpus)
    held = sum(e.documents for e in manifest.splits["val"]) / len(texts)
    assert 0.03 < held < 0.25
    both = decoded(Path(corpus))
    count = sum(e.documents for e in manifest.splits["train"])
    assert not set(both[:count]) & set(both[count:])
    assert np.isclose(len(both), len(texts))
