"""The chosen blocks of queries gathered into visits, and what tiles of visits go through, by Triton's interpreter."""

import pytest
import torch

from configs.schema import Attention
from nsa import tiles, visits
from nsa.cases import Case
from nsa.score import NONE
from tests.kernels import interpreted, packed

pytestmark = interpreted


def choices(case: Case, documents: tiles.Documents) -> torch.Tensor:
    """As `score.choose` leaves them, but chosen at random, and of some queries fewer than there could be."""
    a, generator = case.sizes, torch.Generator().manual_seed(0)
    picks, every = a.n - a.local, documents.tiles(a.l_slc)
    chosen = torch.full((case.tokens, case.kv_heads, picks), NONE, dtype=torch.int32)
    for i, (start, length) in enumerate(zip(case.cu_seqlens.tolist(), case.lengths)):
        first = start // a.l_slc + i
        for t in range(length):
            open_ = max(0, t // a.l_slc - a.local + 1 - a.initial)
            for group in range(case.kv_heads if open_ else 0):
                count = int(torch.randint(0, min(open_, picks - a.initial) + 1, (), generator=generator))
                others = a.initial + torch.randperm(open_, generator=generator)[:count]
                row = torch.cat([torch.arange(a.initial), others]) + first + group * every
                chosen[start + t, group, : len(row)] = row
    return chosen


def seen_by_visit(case: Case, chosen: torch.Tensor, documents: tiles.Documents, span: int) -> dict:
    """(token, KV head, place of the visit): where its blocks start in the pack, in order."""
    a, found = case.sizes, {}
    every = documents.tiles(a.l_slc)
    starts = {}
    for i, (start, length) in enumerate(zip(case.cu_seqlens.tolist(), case.lengths)):
        starts |= {start // a.l_slc + i + j: start + j * a.l_slc for j in range(length // a.l_slc + 1)}
    for t in range(case.tokens):
        for group in range(case.kv_heads):
            blocks = [int(x) - group * every for x in chosen[t, group, a.initial :] if x != NONE]
            leads = [b for b in blocks if not any(c // span == b // span and c < b for c in blocks)]
            for place, lead in enumerate(leads):
                found[t, group, place] = [starts[b] for b in sorted(blocks) if b // span == lead // span]
    return found


OTHER = Attention(l=8, d=8, l_slc=8, n=9, local=1, initial=2)
CASES = [
    (Case("packed", (90, 1, 203, 8, 7), 4, 2, 16, 16, OTHER), 2, 1024),
    (Case("chunks", (150, 20), 2, 1, 16, 16, OTHER), 3, 64),
    (Case("spans of 32", (420,), 1, 1, 16, 16, Attention(l=8, d=8, l_slc=8, n=12, local=1, initial=0)), 1, 1024),
    (Case("a block a span", (100, 30), 2, 1, 16, 16, OTHER), 99, 1024),
]


KEYS = {"16 bits": {}, "32 bits": {"NARROW": 0}, "few bits": {"NARROW": 0, "WIDE": 2**13}}


@pytest.mark.parametrize(("case", "spans", "chunk"), CASES, ids=lambda x: getattr(x, "name", ""))
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_tiles_go_through_what_visits_chose(case, spans, chunk, keys, monkeypatch):
    for name, value in {"SPANS": spans, "CHUNK": chunk, **keys}.items():
        monkeypatch.setattr(visits, name, value)
    documents, a, size = packed(case), case.sizes, 12
    chosen, n = choices(case, documents), case.tokens
    found = visits.gather(chosen, documents, a.initial, a.l_slc)
    chunks = range(-(-n // chunk))
    expected = {}
    for c in chunks:
        span = visits.span(c, documents, a.l_slc)
        assert 1 <= span <= visits.WIDEST
        visits_of = seen_by_visit(case, chosen, documents, span)
        expected |= {key: blocks for key, blocks in visits_of.items() if key[0] // chunk == c}
    assert int(found.counts.sum()) == len(expected)
    seen, blocks_a_tile = {}, []
    for c in chunks:
        *rows, taken = visits.plan(found, documents, c, n, a.l_slc, size).tolist()
        used = int(found.starts[(c + 1) * case.kv_heads * found.spans] // size)
        used += case.kv_heads * found.spans - int(found.starts[c * case.kv_heads * found.spans] // size)
        assert taken[0] == 0
        for count, there, group, *row in rows[:used]:
            assert count == 0 or 0 < there <= size
            who = row[size + 1 : size + 2 * count : 2]
            assert [w >= visits.LAST for w in who] == [False] * (count - 1) + [True] * (count > 0)
            for i in range(there if count else 0):
                (token, head), place = divmod(row[i] // found.most, case.kv_heads), row[i] % found.most
                assert head == group
                assert token // chunk == c
                assert (token, group, place) not in seen
                seen[token, group, place] = [row[size + 2 * j] for j in range(count) if who[j] >> i & 1]
            assert all(w % visits.LAST >> there == 0 for w in who)
            assert count == 0 or row[there:size] == [row[there - 1]] * (size - there)
            blocks_a_tile.append(count)
    assert seen == expected
    assert max(blocks_a_tile) > 1 or span == 1


def test_visits_of_the_same_blocks_share_tiles(monkeypatch):
    """Sorted by their first blocks they go through fewer others, and fewer still in the order of a Gray code."""
    case = Case("long", (560,), 1, 1, 16, 16, Attention(l=8, d=8, l_slc=8, n=14, local=1, initial=0))
    documents, work = packed(case), []
    chosen = choices(case, documents)
    for digits, wide in ((0, 2**17), (3, 2**17), (3, 2**31 - 1)):
        for name, value in {"SPANS": 4, "NARROW": 0, "WIDE": wide, "DIGITS": digits}.items():
            monkeypatch.setattr(visits, name, value)
        found = visits.gather(chosen, documents, 0, 8)
        rows = visits.plan(found, documents, 0, case.tokens, 8, 12)
        used = int(found.starts[-1]) // 12 + found.spans
        work.append(int(rows[:used, 0].sum()))
    assert work[1] < 0.85 * work[0]
    assert work[2] < 0.97 * work[1]


@pytest.mark.parametrize("widest", [1, 10, 32])
@pytest.mark.parametrize("places", [1, 3, 52, 53, 63, 64, 65, 4095, 4096, 100_000])
def test_keys_fit_their_kind(places, widest):
    """The highest of a kind is no key of a visit, and lies at or above where the last place ends."""
    kind, low, bits = visits._key(places, widest)
    assert torch.iinfo(kind).min <= low
    assert low + (places << bits) <= torch.iinfo(kind).max
    assert bits >= widest or kind == torch.int32
    assert low + (places << bits + 1) > torch.iinfo(kind).max or bits == widest


def test_few_bits_leave_visits_as_they_are(monkeypatch):
    """Of many documents and KV heads keys tell less of the blocks."""
    case = Case("many", (3,) * 9 + (100,), 2, 2, 16, 16, OTHER)
    documents = packed(case)
    chosen = choices(case, documents)
    monkeypatch.setattr(visits, "SPANS", 3)
    full = visits.gather(chosen, documents, 2, 8)
    real = (torch.arange(full.most) < full.counts[..., None]).flatten()
    for keys in [*list(KEYS.values())[1:], {"WIDE": 60}]:
        for name, value in keys.items():
            monkeypatch.setattr(visits, name, value)
        found = visits.gather(chosen, documents, 2, 8)
        assert torch.equal(full.counts, found.counts)
        assert torch.equal(full.starts, found.starts)
        assert torch.equal(full.masks[real], found.masks[real])
        assert (found.order[: int(found.starts[-1])].sort().values == real.nonzero().flatten()).all()
