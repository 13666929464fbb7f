"""profile.syncs: lines that make the host wait for a GPU."""

import warnings

import pytest
import torch

from configs.errors import ConfigError
from launch.waits import WARNING, Waits
from tests import tiny


def test_without_a_gpu_it_is_refused():
    with pytest.raises(ConfigError, match=r"profile\.syncs=true: there is no GPU"):
        Waits(tiny.config(profile__syncs=True), torch.device("cpu"))


def test_a_run_without_it_has_no_such_metric():
    waits = Waits(tiny.config(), torch.device("cpu"))
    with waits.watched(quiet=True):
        pass
    assert waits.read() == ({}, [])


def test_what_torch_says_is_counted_by_line(monkeypatch):
    """torch's warning is given by hand here, as a machine without a GPU has none."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = Waits(tiny.config(profile__syncs=True), torch.device("cuda"))

    def waiting():
        warnings.warn(f"{WARNING} (from somewhere in C++)", stacklevel=1)

    for _ in range(2):
        with waits.watched(quiet=True):
            waiting()
            waiting()
    with pytest.warns(UserWarning, match=WARNING), waits.watched(quiet=False):
        waiting()
    with pytest.warns(UserWarning, match="something else"), waits.watched(quiet=True):
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"] * 3
    metric, (line,) = waits.read()
    assert metric == {"syncs_per_step": pytest.approx(4 / 3)}
    assert "/tests/test_waits.py:" in line
    assert line.endswith("in waiting")
    assert waits.read() == ({}, [])


@pytest.mark.gpu
def test_a_line_that_waits_is_named():
    waits = Waits(tiny.config(profile__syncs=True), torch.device("cuda"))
    x = torch.ones(4, device="cuda")
    with waits.watched(quiet=True):
        x.sum()
        x.sum().item()
        x.nonzero()
    metric, lines = waits.read()
    assert metric == {"syncs_per_step": 2}
    assert len(lines) == 2
    assert all("test_waits.py" in line for line in lines)
