"""F20: readers. Training reads ahead in threads, which cannot be killed alone: here they hang, or meet a broken disk.

Those of data.prepare are processes (tests/test_prepare.py).
"""

import re
import time

import pytest

from tests.faults.faulty import SAVES, faulty, same

TIMEOUT = 4


def test_a_reader_that_meets_a_broken_disk(corpus, tmp_path, unbroken_by_two):
    """The run ends with what the thread met and where, and starts again."""
    process = faulty(corpus, tmp_path, "reader fails:1:5", *SAVES, "data.read_ahead=1")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "Input/output error" in said
    assert said.count("starts again from step-00000004") == 1
    same(tmp_path / "run", unbroken_by_two)


@pytest.mark.slow
def test_a_reader_that_hangs_is_named_with_its_place(corpus, tmp_path, unbroken_by_two):
    process = faulty(corpus, tmp_path, "reader hangs:1:4", *SAVES, "data.read_ahead=1", f"parallel.timeout={TIMEOUT}")
    seen = [(time.monotonic(), line) for line in process.stdout]
    assert process.wait(60) == 0
    begun = [t for t, line in seen if line.startswith("step ")]
    ended = next(t for t, line in seen if line.startswith("supervisor: "))
    assert ended - max(t for t in begun if t < ended) < TIMEOUT + 15
    (error,) = [line for _, line in seen if line.startswith("error: ")]
    assert re.search(r"hangs: rank 1 .* at data/loader.py:\d+ in next_step", error)
    (stacks,) = (tmp_path / "run/hang").glob("*/rank-00001.txt")
    assert "in _reader" in stacks.read_text() or "in <lambda>" in stacks.read_text(), "the thread's own stack"
    same(tmp_path / "run", unbroken_by_two)
