"""The core of a layer: what is compressed, what is rotated and where, and which weights learn."""

import itertools

import pytest
import torch
from torch import Tensor

from configs.schema import Attention, Branch, Compression
from nsa import Documents, NSACore, nsa_attention, reference
from parallel.rope import Rope

ROPE = Rope(8, 256, 10000.0, torch.device("cpu"))
CU = torch.tensor([0, 40, 45, 100])
DOCUMENTS = Documents.of(CU, torch.device("cpu"))
N, HEADS, GROUPS, QK, V = 100, 4, 2, 8, 6


def sizes(**changes) -> Attention:
    return Attention(**{"l": 8, "d": 4, "l_slc": 16, "n": 4, "w": 12, **changes})


def core(a: Attention) -> NSACore:
    made = NSACore(a, QK, V)
    for i, p in enumerate(made.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    return made


def inputs(a: Attention, seed: int = 0) -> tuple[Tensor, dict, Tensor]:
    g = torch.Generator().manual_seed(seed)
    kv = {
        b.value: (torch.randn(N, GROUPS, QK, generator=g), torch.randn(N, GROUPS, V, generator=g)) for b in a.branches
    }
    return torch.randn(N, HEADS, QK, generator=g), kv, torch.rand(N, HEADS, len(a.branches), generator=g)


def test_keys_are_compressed_before_they_are_rotated_at_their_blocks_first_position():
    a = sizes()
    made, (q, kv, gates) = core(a), inputs(a)
    positions = torch.cat([torch.arange(n) for n in CU.diff().tolist()])
    first = torch.tensor([i for s, e in itertools.pairwise(CU.tolist()) for i in range(s, e - 7, 4)])
    phi = [reference.compress_mlp(x, first, *p.parameters()) for x, p in zip(kv["cmp"], (made.phi_k, made.phi_v))]
    rotated = {name: (ROPE(k, positions), v) for name, (k, v) in kv.items()}
    expected = nsa_attention(ROPE(q, positions), rotated, ROPE(phi[0], positions[first]), phi[1], gates, CU, a)
    torch.testing.assert_close(made(q, kv, gates, DOCUMENTS, ROPE), expected, rtol=0, atol=0)


def test_every_weight_learns():
    a = sizes()
    made, (q, kv, gates) = core(a), inputs(a)
    made(q, kv, gates, DOCUMENTS, ROPE).sin().sum().backward()
    names = [name for name, _ in made.named_parameters()]
    assert names == [f"phi_{x}.{leaf}" for x in "kv" for leaf in ("pe", "w1", "b1", "w2", "b2")]
    for name, p in made.named_parameters():
        assert p.grad.abs().max() > 1e-6, name


def test_share_is_applied_once_to_every_weight():
    a, seen = sizes(), []
    made, (q, kv, gates) = core(a), inputs(a)
    made(q, kv, gates, DOCUMENTS, ROPE, share=lambda p: seen.append(p) or p)
    assert [id(p) for p in seen] == [id(p) for p in made.parameters()]


@pytest.mark.parametrize("changed", [0, 50, 99])
def test_causal_through_the_whole_core(changed):
    a = sizes()
    made, (q, kv, gates) = core(a), inputs(a)
    before = made(q, kv, gates, DOCUMENTS, ROPE)
    for t in (q, gates, *(x for pair in kv.values() for x in pair)):
        t[changed] += 1
    after = made(q, kv, gates, DOCUMENTS, ROPE)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed], after[changed])
    end = CU[torch.searchsorted(CU, changed, right=True)]  # of the document that the token is in
    assert torch.equal(before[end:], after[end:])


@pytest.mark.parametrize(
    "changes",
    [
        {"branches": [Branch.win]},
        {"branches": [Branch.cmp]},
        {"branches": [Branch.slc], "compression": Compression.mean},
        {"compression": Compression.mean},
        {"phi_hidden": 5},
    ],
    ids=str,
)
def test_ablations_run_with_the_weights_they_need(changes):
    a = sizes(**changes)
    made, (q, kv, gates) = core(a), inputs(a)
    o = made(q, kv, gates, DOCUMENTS, ROPE)
    assert o.shape == (N, HEADS, V)
    assert o.isfinite().all()
    learns = Branch.cmp in a.branches and a.compression is Compression.mlp
    assert bool(list(made.parameters())) == learns
    if a.phi_hidden:
        assert made.phi_k.w1.shape == (5, 8 * QK)


@pytest.mark.parametrize("branches", [[Branch.slc], [Branch.win, Branch.slc]], ids=str)
def test_without_cmp_selection_scores_by_the_mean_of_the_keys_it_selects(branches):
    a = sizes(branches=branches, compression=Compression.mean, l_slc=8)  # more blocks in a document than the n chosen
    made, (q, kv, gates) = core(a), inputs(a)
    other = core(sizes(compression=Compression.mean, l_slc=8))
    three = {"cmp": kv["slc"], "win": kv["slc"], **kv}
    places = [list(Branch).index(b) for b in branches]
    only = torch.zeros(N, HEADS, 3).index_copy(2, torch.tensor(places), gates)
    torch.testing.assert_close(made(q, kv, gates, DOCUMENTS, ROPE), other(q, three, only, DOCUMENTS, ROPE))
