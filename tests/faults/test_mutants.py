"""Whether the suite notices that a protection is gone: each is taken out of a copy of the tree, and tests have to fail.

Several minutes: `pytest -m slow tests/faults/test_mutants.py`.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_train import ROOT

pytestmark = pytest.mark.slow

FOLDERS = ("configs", "data", "launch", "nsa", "parallel", "tests")
SAVER, CHECKPOINT, KILL = "parallel/saver.py", "parallel/checkpoint.py", "tests/faults/test_kill.py"
DISK, SPIKES, UNIT = "tests/faults/test_disk.py", "tests/faults/test_spikes.py", "tests/test_checkpoint.py"
MUTANTS = {  # what is taken away: where, what stands there, what comes in its place, the tests that have to notice
    "hash of a file": (
        CHECKPOINT,
        'if sha256(folder / name) != entry["sha256"]:',
        "if False:",
        UNIT,
        "flipped",
    ),
    "hash of the manifest": (
        CHECKPOINT,
        'if k != "sha256"}) != manifest:',
        'if k != "sha256"}) is None:',
        UNIT,
        "flipped",
    ),
    "files that nobody listed": (
        CHECKPOINT,
        'there - {*manifest["files"]',
        'set() - {*manifest["files"]',
        UNIT,
        "many",
    ),
    "format of a checkpoint": (
        CHECKPOINT,
        "if version not in (None, VERSION):",
        "if False:",
        UNIT,
        "format",
    ),
    "setting aside": (
        CHECKPOINT,
        "path.rename(aside)",
        "pass",
        UNIT,
        "beside_itself",
    ),
    "rename": (
        SAVER,
        'temporary, first = self.apart, final.with_suffix(".tmp")',
        "temporary, first = self.apart, final",
        KILL,
        "pieces",
    ),
    "sync of a file": (
        SAVER,
        '    with open(path, "rb") as f:\n        os.fsync(f.fileno())\n',
        "",
        UNIT,
        "on_the_disk",
    ),
    "sync before the rename": (
        SAVER,
        "    _sync_folder(temporary)\n    os.rename(temporary, final)",
        "    os.rename(temporary, final)",
        UNIT,
        "on_the_disk",
    ),
    "one error on all ranks": (
        SAVER,
        "return together(guarded, mesh)",
        "return guarded()",
        DISK,
        "full_for_one_rank",
    ),
    "nothing half-written stays": (
        SAVER,
        "agree(mesh, lambda: shutil.rmtree(temporary, ignore_errors=True))",
        "pass",
        DISK,
        "full_for_one_rank",
    ),
    "a look before the first step": (
        SAVER,
        "_everyone(mesh, self.root, lambda: _probe(self.root, mesh.rank))",
        "pass",
        DISK,
        "file",
    ),
    "a published step stays": (
        SAVER,
        "if agree(self.mesh, final.exists):",
        "if False:",
        UNIT,
        "beside_itself",
    ),
    "the newest are kept": (
        SAVER,
        "published(final.parent.parent)[keep:]",
        "published(final.parent.parent)[:-keep]",
        UNIT,
        "newest",
    ),
    "the copy": (
        "parallel/host.py",
        "        return self.flat\n",
        "        return flat\n",
        UNIT,
        "behind_training",
    ),
    "the wait for the last save": (
        "train.py",
        "    run.saver.wait(last=True)\n",
        "",
        KILL,
        "to_stop",
    ),
    "numbers that are none": (
        "parallel/guard.py",
        "if not math.isfinite(loss) or not math.isfinite(norm):",
        "if False:",
        "tests/test_guard.py",
        "budgets",
    ),
    "statistics without them": (
        "parallel/guard.py",
        "            self.skipped += 1\n",
        "            self.skipped += 1\n            self.losses.append(loss)\n",
        "tests/test_guard.py",
        "window or later",
    ),
    "one decision on all ranks": (
        "parallel/engine.py",
        "        if self.mesh.world > 1:\n            dist.broadcast",
        "        if False:\n            dist.broadcast",
        "tests/test_guard.py",
        "trace and pp",
    ),
    "what is passed over is kept": (
        "launch/rollbacks.py",
        "    together(lambda: write(folder",
        "    (lambda: write(folder",
        SPIKES,
        "killed",
    ),
    "abandoned steps": (
        CHECKPOINT,
        '("abandoned", later)',
        '("abandoned", [])',
        SPIKES,
        "past_their_batches and 50",
    ),
    "checksums of the data": (
        "data/shards.py",
        "if not self._good[page] and zlib",
        "if False and zlib",
        "tests/test_loader.py",
        "damage and flipped",
    ),
    "rows that others cannot read": (
        "train.py",
        "    batches = loader.blank(batches, set(found))\n",
        "",
        "tests/test_stream.py",
        "one_node",
    ),
}


def copy(folder: Path) -> Path:
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", ".pytest.ini"):
        shutil.copy(ROOT / name, folder)
    return folder


def verdict(folder: Path, tests: str, which: str) -> tuple[int, str]:
    """pytest's code there: 0 all passed, 1 some failed; and what it says."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-c", ".pytest.ini", tests, "-k", which]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", MUTANTS)
def test_a_protection_that_is_gone_is_missed(tmp_path, name):
    file, there, instead, tests, which = MUTANTS[name]
    folder = copy(tmp_path)
    code, said = verdict(folder, tests, which)
    assert code == 0, said
    text = (folder / file).read_text()
    assert text.count(there) == 1, f"{there!r} in {file}"
    (folder / file).write_text(text.replace(there, instead))
    code, said = verdict(folder, tests, which)
    assert code == 1, said
