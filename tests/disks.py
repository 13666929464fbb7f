"""File systems in memory, for tests of disks that are full or take nothing."""

import subprocess
from pathlib import Path

import pytest


def mount(disk: Path, options: str) -> None:
    """A file system in memory."""
    line = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    if subprocess.run(line, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
