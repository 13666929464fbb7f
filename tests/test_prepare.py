"""Preparing data as a user does: same bytes for any number of workers, nothing half-made, mistakes in one line."""

import gzip
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import inspect, prepare, tokenizer
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


def test_jsonl(tmp_path, texts):
    lines = "".join(json.dumps({"body": t}) + "\n" for t in texts[:30])
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.replace("def ", "DEF ").encode()))
    files = ("--input", tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz")
    assert run(*files, "--output", tmp_path / "out", *SMALL, "--field", "body") == 0
    expected = texts[:30] + [t.replace("def ", "DEF ") for t in texts[:30]]
    assert sorted(decoded(tmp_path / "out")) == sorted(expected)


def mistakes(tmp_path: Path) -> dict[str, tuple]:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    (tmp_path / "ok.txt").write_text("some text " * 50)
    (tmp_path / "bad.tiktoken").write_text("IQ== 0\nIg== 7\n")
    ok = ("--input", tmp_path / "ok.txt")
    return {
        "no such file or directory": ("--input", tmp_path / "absent"),
        "holds no text": ("--input", tmp_path / "hollow"),
        "line 2": ("--input", tmp_path / "bad.jsonl"),
        "not known": (*ok, "--tokenizer", "gpt5"),
        "have no rank": (*ok, "--tokenizer", tmp_path / "bad.tiktoken"),
        "smaller than": (*ok, "--tokenizer", "bpe:100"),
        "leaves nothing to train on": (*ok, "--val-fraction", 1.0),
    }


SAYS = "no such file or directory,holds no text,line 2,not known,have no rank,smaller than,leaves nothing to train on"


@pytest.mark.parametrize("says", SAYS.split(","))
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, capsys, says):
    options = mistakes(tmp_path)[says]
    before = sorted(tmp_path.iterdir())
    assert run("--workers", 1, "--output", tmp_path / "out", *options) == 65
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert says in error
    assert sorted(tmp_path.iterdir()) == before


def test_named_ranks_without_a_network_are_one_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    (tmp_path / "ok.txt").write_text("some text")
    assert run("--input", tmp_path / "ok.txt", "--output", tmp_path / "out", "--tokenizer", "o200k_base") == 65
    assert "TIKTOKEN_CACHE_DIR" in capsys.readouterr().err


def test_killed_half_way_leaves_no_output(tmp_path):
    options = ["--input", "stdlib", "--output", str(tmp_path / "out"), "--tokenizer", "bpe:300", "--limit-mb", "8"]
    command = [sys.executable, "-m", "data.prepare", *options]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("out.tmp-*/*.spill")) and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("out.tmp-*/*.spill")), "it was not under way"
    assert not (tmp_path / "out").exists()


def test_inspect(corpus, capsys):
    assert inspect.main([corpus, "--verify"]) == 0
    out = capsys.readouterr().out
    assert "every hash matches" in out
    assert "train:" in out
    assert inspect.main([corpus, "--document", "0"]) == 0
    assert len(capsys.readouterr().out) > 10
    assert inspect.main([corpus, "--document", "1000000"]) == 65
    assert inspect.main([corpus + "-absent"]) == 65


def test_held_out_documents_are_a_share_and_never_in_training(corpus, texts):
    manifest = read_manifest(corpus)
    held = sum(e.documents for e in manifest.splits["val"]) / len(texts)
    assert 0.03 < held < 0.25
    both = decoded(Path(corpus))
    count = sum(e.documents for e in manifest.splits["train"])
    assert not set(both[:count]) & set(both[count:])
    assert np.isclose(len(both), len(texts))
