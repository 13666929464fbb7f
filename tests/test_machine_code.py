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
    assert int(done.stderr.split()[-2]) > 20, "it has to have seen the products"
    return done


FOR_HOPPER = """
import sys
from triton.runtime import driver
from tests import machine_code as m
driver.set_active(m.Hopper())
WIDTHS = (64, 64), (128, 128), (192, 128)
"""


def test_what_stays_in_a_loop_shares_no_register_with_what_does_not():
    assert look().stdout == ""


def test_chosen_blocks_are_fetched_by_the_copy_engine_and_nothing_spills():
    """For each width: loads (queries of a tile in three places and a block, by panel), stores, waits for products (two
    in each of three warpgroups: more if they ran one by one); STL would be a spill."""
    report = """
codes = [m.chosen(*widths) for widths in WIDTHS]
words = ("UTMALDG", "UTMASTG", "WARPGROUP.DEPBAR", "STL", "LDL")
print(*([c.count(word) for c in codes] for word in words))
print(sum(c.count("HGMMA") for c in codes), "products", file=sys.stderr)
"""
    loads, stores, none = [3 * 12 + 2, 3 * 24 + 4, 3 * 36 + 5], [12, 24, 24], [0] * 3
    assert look("-c", FOR_HOPPER + report).stdout.strip() == f"{loads} {stores} {[6] * 3} {none} {none}"


def test_gradients_of_chosen_blocks_are_made_by_warpgroups_side_by_side():
    """For each width: scatters, waits for products (two where weights are made, by two warpgroups or one, and one each
    for queries and keys: more if products ran one by one), and what is spilled where products are."""
    report = """
codes = [m.gradients(*widths) for widths in WIDTHS]
loops = ["".join(m.inner_loops(c)) for c in codes]
print(*([c.count(word) for c in codes] for word in ("UTMASTG", "WARPGROUP.DEPBAR")))
print(*([c.count(word) for c in loops] for word in ("STL", "LDL")))
print(sum(c.count("HGMMA") for c in codes), "products", file=sys.stderr)
"""
    assert look("-c", FOR_HOPPER + report).stdout.split("\n")[:2] == ["[4, 8, 12] [6, 6, 4]", "[0, 0, 0] [0, 0, 0]"]


def test_where_bands_are_multiplied_nothing_spills():
    """Each of three warpgroups has a loop over tiles of keys: the products, an exponential a score and one a row."""
    report = """
loops = [[c for c in m.inner_loops(m.near(*w)) if 'EX2' in c][:3] for w in WIDTHS]
for word in ("HGMMA", "MUFU.EX2", "STL", "LDL"):
    print([[loop.count(word) for loop in found] for found in loops])
print(sum(loop.count("HGMMA") for found in loops for loop in found), "products", file=sys.stderr)
"""
    products, exponentials, spills = [[8] * 3, [12] * 3, [16] * 3], [[34] * 3] * 3, [[0] * 3] * 3
    expected = "\n".join(map(str, (products, exponentials, spills, spills)))
    assert look("-c", FOR_HOPPER + report).stdout.strip() == expected


def test_it_would_be_seen():
    without = "from nsa import band, band_backward as b; never = lambda *_: False; band.shares_registers = never; "
    without += "b.shares_registers = never; from tests import machine_code as m; m.SETS = [['slc'], ['win']]; m.main()"
    found = look("-c", without).stdout
    assert "_forward of ['slc'] at 64" in found
    assert "at 128" not in found
