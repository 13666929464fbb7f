"""The attention layer: column-parallel projections, full or sparse attention on local heads, row-parallel output.

Heads are cut by KV head: a query group stays with its KV head, so attention itself needs no communication.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.schema import Config, Kind
from nsa import Documents, NSACore, check_backend
from parallel.rope import Rope
from parallel.tensor import ColumnLinear, RowLinear, TensorParallel

ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class FullAttention(nn.Module):
    """Causal softmax attention with grouped KV heads: x [n or n/tp, dim] -> the same shape."""

    def __init__(self, cfg: Config, tp: TensorParallel, rope: Rope):
        super().__init__()
        m = cfg.model
        self.qk_dim, self.v_dim = m.qk_dim, m.v_dim
        self.tp, self.rope = tp, rope
        self.wq = ColumnLinear(m.dim, m.heads * m.qk_dim, tp)
        self.wk = ColumnLinear(m.dim, m.kv_heads * m.qk_dim, tp)
        self.wv = ColumnLinear(m.dim, m.kv_heads * m.v_dim, tp)
        self.wo = RowLinear(m.heads * m.v_dim, m.dim, tp)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        x = self.tp.enter(x)
        q = self.rope(self.wq(x).unflatten(1, (-1, self.qk_dim)), documents.positions)  # [n, heads/tp, qk_dim]
        k = self.rope(self.wk(x).unflatten(1, (-1, self.qk_dim)), documents.positions)  # [n, kv_heads/tp, qk_dim]
        v = self.wv(x).unflatten(1, (-1, self.v_dim))  # [n, kv_heads/tp, v_dim]
        return self.tp.leave(self.wo(causal_attention(q, k, v, documents.cu_seqlens).flatten(1)))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within each document by torch's kernels: q [n, h, e], k [n, g, e], v [n, g, f] -> [n, h, f].

    One call a document: the kernels that take no mask are the fast ones, and no work is spent across documents. cuDNN's
    makes a plan for each new length, which takes longer than the attention, so that it only serves whole rows.
    """
    out = []
    documents = list(itertools.pairwise(cu_seqlens.tolist()))
    with sdpa_kernel(ANY_LENGTH + [SDPBackend.CUDNN_ATTENTION] * (len(documents) == 1)):
        for s, e in documents:
            heads = (t[s:e].transpose(0, 1)[None] for t in (q, k, v))  # [1, heads, tokens, width]
            out.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(out)


class SparseAttention(nn.Module):
    """Native sparse attention: x [n or n/tp, dim] -> the same shape.

    The columns of wk and wv run (KV head, branch, width) and those of the gate (head, branch), so that a cut by rows
    of the weight is a cut by head.
    """

    def __init__(self, cfg: Config, tp: TensorParallel, rope: Rope):
        super().__init__()
        m, self.sizes = cfg.model, cfg.attention
        # Before a run is made, not in its first step.
        check_backend(self.sizes, m.qk_dim, m.v_dim, m.heads // m.kv_heads)
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

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        x = self.tp.enter(x)
        q = self.wq(x).unflatten(1, (-1, self.qk_dim))  # [n, heads/tp, qk_dim]
        k = self.wk(x).unflatten(1, (-1, self.pairs, self.qk_dim)).unbind(2)  # pairs of [n, kv_heads/tp, qk_dim]
        v = self.wv(x).unflatten(1, (-1, self.pairs, self.v_dim)).unbind(2)
        kv = {name: (k[i % self.pairs], v[i % self.pairs]) for i, name in enumerate(self.branches)}
        gates = self.gate(x).unflatten(1, (-1, len(self.branches))).sigmoid()  # [n, heads/tp, branches]
        o = self.core(q, kv, gates, documents, self.rope, share=self.tp.share_inside)
        return self.tp.leave(self.wo(o.flatten(1)))


def build(cfg: Config, tp: TensorParallel, rope: Rope) -> nn.Module:
    """The attention layer that `cfg.attention.kind` names."""
    return (SparseAttention if cfg.attention.kind is Kind.nsa else FullAttention)(cfg, tp, rope)
