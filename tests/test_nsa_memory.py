"""What backward of NSA's kernels holds at a time, by arithmetic, against every tensor that it makes on a CPU."""

from dataclasses import replace

import pytest
import torch

from configs.schema import Attention, Branch
from nsa import fused, memory
from nsa.cases import Case, make_inputs
from tests.kernels import interpreted
from tests.test_peak import Live

pytestmark = interpreted

LONG = Case("long", (96,), 16, 1, 32, 16, Attention(l=16, d=8, l_slc=16, n=4, local=1, w=20))


def held(case: Case) -> int:
    """The most bytes that backward makes at a time, its gradients included."""
    x, a = {name: t.detach() for name, t in make_inputs(case, torch.bfloat16).items()}, case.sizes
    six = [x[f"{kind}_{branch}"] for branch in fused.NAMES for kind in "kv"]
    numbers = [a.l, a.d, a.l_slc, a.n, a.initial, a.local, a.w, *(fused.NAMES.index(b.value) for b in a.branches)]
    gates = x["gates"][..., : len(a.branches)].contiguous()
    given = (x["q"], *six, gates, case.cu_seqlens, None)
    o, *saved = fused._nsa._init_fn(*given, numbers)
    do, live = torch.randn_like(o), Live()
    for t in (do, *given[:-1], *saved):
        live.follow(t)
    start = live.now
    with live:
        fused._nsa_backward._init_fn(do, *given, saved, numbers)
    return live.peak - start


TWO = replace(LONG, sizes=replace(LONG.sizes, branches=[Branch.cmp, Branch.win]))


@pytest.mark.parametrize(
    "case", [LONG, replace(LONG, lengths=(48, 48)), TWO], ids=["long", "short documents", "two branches"]
)
def test_what_backward_holds(case):
    a, length = case.sizes, case.lengths[0]
    s = memory.Shape(case.tokens, length, case.blocks, case.heads, case.kv_heads, case.qk_dim, case.v_dim, 2)
    expected = memory.backward(s, a) - 2 * case.tokens * case.heads * case.v_dim  # the output's own is given
    assert held(case) == pytest.approx(expected, rel=0.1)
