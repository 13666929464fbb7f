"""The measures of sparse attention on inputs whose answer is known."""

import math

import pytest
import torch

from configs.schema import Attention, Branch
from nsa.health import _runs, measure

A = Attention(l=8, d=8, l_slc=8, n=3, initial=1, local=1, w=16)
CU = torch.tensor([0, 8, 136])  # the second document has 16 blocks
HEADS, GROUPS, WIDTH = 2, 1, 16


def look(k_cmp: torch.Tensor, a: Attention = A, q: float = 1.0) -> dict[str, float]:
    queries = torch.full((136, HEADS, WIDTH), q)
    gates = torch.tensor([0.25, 0.5, 1.0][: len(a.branches)]).expand(136, HEADS, -1)
    return measure(queries, k_cmp, gates, CU, a)


def keys(favoured: int) -> torch.Tensor:
    """Compressed keys of both documents, of which all queries want one block of the second."""
    k = torch.zeros(17, GROUPS, WIDTH)
    k[1 + favoured] = 10.0
    return k


def test_gates_by_branch():
    seen = look(keys(1))
    assert (seen["gate_cmp"], seen["gate_slc"], seen["gate_win"]) == (0.25, 0.5, 1.0)


def test_all_want_one_block_far_away():
    seen = look(keys(1))
    # The ties of the rest go to the smaller index: every query that has a choice takes block 1.
    assert seen["entropy"] < 0.15
    assert seen["overlap"] == pytest.approx(1.0, abs=0.03)
    assert seen["far"] > 0.8


def test_equal_scores_have_entropy_one():
    seen = look(torch.zeros(17, GROUPS, WIDTH))
    # A block counts when it is whole: the own one has no score until its last query.
    assert 0.85 < seen["entropy"] <= 1.0


def test_a_window_over_everything_leaves_nothing_far():
    wide = Attention(l=8, d=8, l_slc=8, n=3, initial=1, local=1, w=128)
    assert look(keys(1), wide)["far"] == 0.0


def test_by_hand_at_one_place():
    """The last two queries of the document, t = 126 and 127: blocks 0 and 15 are forced, block 5 is chosen."""
    from nsa.health import _queries

    got = _queries(torch.ones(2, HEADS, WIDTH), keys(5)[1:], 126, A)
    assert got["far"].tolist() == [1.0, 1.0]
    assert got["overlap"].tolist() == [1.0]
    p = torch.tensor([math.exp(40.0)] + [1.0] * 14)
    p = p / p.sum()
    assert got["entropy"][0].item() == pytest.approx((-(p * p.log()).sum() / math.log(16)).item(), abs=1e-5)


def test_without_selection_only_gates_are_there():
    a = Attention(branches=[Branch.win])
    assert look(None, a) == {"gate_win": 0.25}
    a = Attention(l=8, d=8, l_slc=8, branches=[Branch.cmp, Branch.win])
    assert set(look(keys(1), a)) == {"gate_cmp", "gate_win"}


@pytest.mark.parametrize("length", [1, 2, 5, 8, 17, 130])
def test_the_queries_looked_at_are_in_the_document_and_no_one_twice(length):
    looked = [t for start, end in _runs(length) for t in range(start, end)]
    assert looked == sorted(set(looked))
    assert looked[-1] == length - 1
    assert looked[0] >= 0


def test_documents_too_short_for_a_choice_leave_out_what_has_no_meaning():
    gates = torch.full((4, HEADS, 3), 0.5)
    cu = torch.tensor([0, 1, 2, 3, 4])
    seen = measure(torch.ones(4, HEADS, WIDTH), torch.zeros(0, GROUPS, WIDTH), gates, cu, A)
    assert set(seen) == {"gate_cmp", "gate_slc", "gate_win"}
    assert all(math.isfinite(v) for v in seen.values())
