"""The attention layer: column-parallel projections of x [n or n/tp, dim], full or sparse attention on local heads,
row-parallel output. Three steps, so that the two beside attention itself can be compiled.

Heads are cut by KV head: a query group stays with its KV head, so attention itself needs no communication.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.schema import Config, Kind
from nsa import Documents, NSACore, check_backend
from parallel.rope import Rope
from parallel.tensor import ColumnLinear, RowLinear, TensorParallel, columns

ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FullAttention(nn.Module):
    """Causal softmax attention with grouped KV heads, in three steps: project, attend, output."""

    def __init__(self, cfg: Config, tp: TensorParallel, rope: Rope):
        super().__init__()
        m = cfg.model
        self.qk_dim, self.v_dim = m.qk_dim, m.v_dim
        self.tp, self.rope = tp, rope
        self.wq = ColumnLinear(m.dim, m.heads * m.qk_dim, tp)
        self.wk = ColumnLinear(m.dim, m.kv_heads * m.qk_dim, tp)
        self.wv = ColumnLinear(m.dim, m.kv_heads * m.v_dim, tp)
        self.wo = RowLinear(m.heads * m.v_dim, m.dim, tp)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries [n, heads/tp, qk_dim], keys [n, kv_heads/tp, qk_dim] and values [n, kv_heads/tp, v_dim]."""
        projections = columns(self.tp, x, self.wq, self.wk, self.wv)
        q, k, v = (t.unflatten(1, (-1, e)) for t, e in zip(projections, (self.qk_dim, self.qk_dim, self.v_dim)))
        return q, k, v

    def attend(self, projections: tuple[Tensor, ...], documents: Documents) -> Tensor:
        """Attention of local heads, [n, heads/tp * v_dim]."""
        q, k, v = projections
        q, k = (self.rope(t, documents.positions) for t in (q, k))
        return causal_attention(q, k, v, documents.cu_seqlens).flatten(1)

    def output(self, o: Tensor) -> Tensor:
        """[n, heads/tp * v_dim] -> [n or n/tp, dim]."""
        return self.wo(o)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within each document by torch's kernels: q [n, h, e], k [n, g, e], v [n, g, f] -> [n, h, f].

    No mask: the kernels that take none are the fast ones, and no work is spent across documents. Documents of one
    length, such as whole rows, are a batch; others take a call each. cuDNN's kernel makes a plan for each new length,
    which takes longer than the attention, so that it only serves the former.
    """
    lengths = cu_seqlens.diff().tolist()
    if len(set(lengths)) == 1:
        return _attend(q, k, v, (len(lengths), lengths[0]), [SDPBackend.CUDNN_ATTENTION, *ANY_LENGTH])
    parts = zip(lengths, *(t.split(lengths) for t in (q, k, v)))
    return torch.cat([_attend(*qkv, (1, n), ANY_LENGTH) for n, *qkv in parts])


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: tuple[int, int], backends: list[SDPBackend]) -> Tensor:
    """Of documents of one length, (how many, tokens), one after the other."""
    heads = (t.unflatten(0, batch).transpose(1, 2) for t in (q, k, v))  # [documents, heads, tokens, width]
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)


class SparseAttention(nn.Module):
    """Native sparse attention, in three steps: project, attend, output.

    The columns of wk and wv run (KV head, branch, width) and those of the gate (head, branch), so that a cut by rows
    of the weight is a cut by head.
    """

    def __init__(self, cfg: Config, tp: TensorParallel, rope: Rope):
        super().__init__()
        m, self.sizes = cfg.model, cfg.attention
        check_backend(self.sizes)  # before a run is made, not in its first step
        self.branches = [b.value for b in self.sizes.branches]
        self.qk_dim, self.v_dim = m.qk_dim, m.v_dim
        self.tp, self.rope = tp, rope
        self.pairs = 1 if self.sizes.shared_kv else len(self.branches)  # key-value pairs of a token and KV head
        self.wq = ColumnLinear(m.dim, m.heads * m.qk_dim, tp)
        self.wk = ColumnLinear(m.dim, m.kv_heads * self.pairs * m.qk_dim, tp)
        self.wv = ColumnLinear(m.dim, m.kv_heads * self.pairs * m.v_dim, tp)
        self.gate = ColumnLinear(m.dim, m.heads * len(self.branches), tp)
        self.wo = RowLinear(m.heads * m.v_dim, m.dim, tp)
        self.core = NSACore(self.sizes, m.qk_dim, m.v_dim)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries [n, heads/tp, qk_dim], keys, values [n, kv_heads/tp, pairs, width], gates [n, heads/tp, branches]."""
        q, k, v, gates = columns(self.tp, x, self.wq, self.wk, self.wv, self.gate)
        q = q.unflatten(1, (-1, self.qk_dim))
        k, v = (t.unflatten(1, (-1, self.pairs, e)) for t, e in ((k, self.qk_dim), (v, self.v_dim)))
        return q, k, v, gates.unflatten(1, (-1, len(self.branches))).sigmoid()

    def attend(self, projections: tuple[Tensor, ...], documents: Documents) -> Tensor:
        """Attention of local heads, [n, heads/tp * v_dim]."""
        q, k, v, gates = projections
        k, v = k.unbind(2), v.unbind(2)
        kv = {name: (k[i % self.pairs], v[i % self.pairs]) for i, name in enumerate(self.branches)}
        return self.core(q, kv, gates, documents, self.rope, share=self.tp.share_inside).flatten(1)

    def output(self, o: Tensor) -> Tensor:
        """[n, heads/tp * v_dim] -> [n or n/tp, dim]."""
        return self.wo(o)


def build(cfg: Config, tp: TensorParallel, rope: Rope) -> nn.Module:
    """The attention layer that `cfg.attention.kind` names."""
    return (SparseAttention if cfg.attention.kind is Kind.nsa else FullAttention)(cfg, tp, rope)
