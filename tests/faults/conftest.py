"""Runs that nothing happens to, once for all tests."""

from pathlib import Path

import pytest

from tests.faults.faulty import SAVES
from tests.test_train import train


@pytest.fixture(scope="session")
def unbroken_by_two(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("two") / "run"
    train(corpus, run, *SAVES, processes=2)
    return run
