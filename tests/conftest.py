"""One thread a process: tests fork their ranks, and a forked child must not inherit a pool of OpenMP threads."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from data import prepare

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """A small prepared data set with several shards and held-out documents: part of the standard library's sources."""
    path = tmp_path_factory.mktemp("corpus") / "stdlib"
    options = "--tokenizer bpe:500 --limit-mb 0.5 --shard-tokens 30000 --val-fraction 0.15 --workers 1"
    assert prepare.main(["--input", "stdlib", "--output", str(path), *options.split()]) == 0
    return str(path)
