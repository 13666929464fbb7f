"""One thread a process: tests fork their ranks, and a forked child must not inherit a pool of OpenMP threads."""

import argparse
import ast
import inspect
import json
import os
import pickle
import subprocess
import tarfile
import threading
import typing
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

if not torch.cuda.is_available():  # triton reads it when it is imported: its kernels then run on a CPU, where asked for
    os.environ["TRITON_INTERPRET"] = "1"

from data import prepare
from tests.disks import mount

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


SOURCES = [argparse, ast, inspect, pickle, subprocess, tarfile, threading, typing]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Short real documents: the paragraphs (methods, mostly) of some modules of the standard library."""
    return [part for module in SOURCES for part in inspect.getsource(module).split("\n\n") if part.strip()]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> str:
    """Those prepared, as several shards and a held-out one."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    options = "--tokenizer bpe:500 --shard-tokens 30000 --val-fraction 0.1 --workers 1"
    files = ["--input", str(folder / "texts.jsonl"), "--output", str(folder / "tokens")]
    assert prepare.main([*files, *options.split()]) == 0
    return str(folder / "tokens")


@pytest.fixture
def small_disk(tmp_path) -> Path:
    """A disk of 400 kB, less than a checkpoint needs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "size=400k")
    yield disk
    subprocess.run(["umount", disk], check=True)
