"""The arithmetic of what NSA in plain torch keeps and needs, against every tensor that a real layer makes."""

import gc

import pytest
import torch

from configs.schema import Attention, Backend, Branch, Compression
from nsa import reference_memory
from nsa.core import NSACore
from nsa.documents import Documents
from nsa.memory import Shape
from parallel.metrics import blocks
from parallel.rope import Rope
from tests.test_peak import Live

HEADS, KV_HEADS, QK_DIM, V_DIM = 6, 2, 32, 16


def measured(tokens: int, documents: int, a: Attention) -> tuple[int, int]:
    """Bytes kept by forward, output included, and the most that backward makes beside them."""
    here, pairs, kind = torch.device("cpu"), 1 if a.shared_kv else len(a.branches), torch.bfloat16
    core = NSACore(a, QK_DIM, V_DIM).to(kind)
    rope = Rope(QK_DIM, tokens // documents, 10000.0, here, lambda f: f)
    where = Documents.of(torch.arange(0, tokens + 1, tokens // documents), here)
    where.blocks(a.l, a.d)
    shapes = [(HEADS, QK_DIM), (KV_HEADS, pairs, QK_DIM), (KV_HEADS, pairs, V_DIM), (HEADS, len(a.branches))]
    q, k, v, gates = (torch.rand(tokens, *shape, dtype=kind, requires_grad=True) for shape in shapes)
    for p in core.parameters():
        p.data.fill_(0.01)
        p.grad = torch.zeros_like(p)
    live = Live()
    for x in [
        *(x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)),
        *(p.grad for p in core.parameters()),
    ]:
        live.follow(x)
    start = live.now
    with live:
        keys, values = k.unbind(2), v.unbind(2)
        kv = {b.value: (keys[i % pairs], values[i % pairs]) for i, b in enumerate(a.branches)}
        out = core(q, kv, gates, where, rope)
        kept = live.now - start
        live.peak = live.now
        out.backward(out.detach())
    return kept, live.peak - start - kept


RUNS = [
    (1024, 1, {}),
    (1024, 4, {}),
    (2560, 1, {}),
    (2560, 1, dict(shared_kv=True)),
    (2560, 1, dict(branches=[Branch.win])),
    (2560, 1, dict(branches=[Branch.slc], compression=Compression.mean)),
]


@pytest.mark.parametrize(("tokens", "documents", "options"), RUNS, ids=str)
def test_what_a_layer_keeps_and_needs(tokens, documents, options):
    a = Attention(backend=Backend.torch, n=8, w=256, **options)
    length = tokens // documents
    s = Shape(tokens, length, documents * blocks(length, a.l, a.d), HEADS, KV_HEADS, QK_DIM, V_DIM, 2)
    output, given = 2 * tokens * HEADS * V_DIM, 2 * tokens * HEADS * len(a.branches)  # beside what the layer keeps
    expected = sum(reference_memory.kept(s, a).values()) + output - given
    kept, needed = measured(tokens, documents, a)
    assert kept == pytest.approx(expected, rel=0.03)
    # Of short documents nearly all is kept, and what backward makes beside is little.
    assert kept + needed == pytest.approx(expected + reference_memory.backward(s, a), rel=0.1)
