"""Machine code for a Hopper GPU, made and looked at on any machine."""

import os
import subprocess
import sys

import pytest

from tests.test_train import ROOT

pytest.importorskip("triton")


def look(*more: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    script = [sys.executable, *(more or [str(ROOT / "tests/machine_code.py")])]
    done = subprocess.run(script, capture_output=True, text=True, env=env, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-2]) > 100, "it has to have seen the products"
    return done


def test_what_stays_in_a_loop_shares_no_register_with_what_does_not():
    assert look().stdout == ""


def test_it_would_be_seen():
    without = "from nsa import band, band_backward as b; never = lambda *_: False; band.shares_registers = never; "
    without += "b.shares_registers = never; from tests import machine_code as m; m.SETS = [['slc'], ['win']]; m.main()"
    found = look("-c", without).stdout
    assert "_forward of ['slc'] at 64" in found
    assert "at 128" not in found
