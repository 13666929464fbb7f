"""Native sparse attention (arXiv 2502.11089) in plain torch: the definition that everything else is compared with, and
the backend where no Triton kernel runs.

Tensors are flat over the tokens of packed documents, [n, heads, width]; `cu_seqlens` (host memory) holds the documents'
starts, and n at the end. Every branch stays within its document and every grid is anchored at its start. Letters are
the paper's, as in configs.schema.Attention; positions and block indices count from 0. Softmax is in fp32 at least.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configs.schema import Attention, Branch

CHUNKS = (256, 1024)  # least and most queries whose scores are held at once; an eighth of the document between
KEEP = 2048  # documents up to this length keep their scores for backward, longer ones compute them again


def block_starts(cu_seqlens: Tensor, l: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the compression blocks of all documents are, in host memory.

    Returns cu_blocks [documents + 1], and of each block [m] its first token in the pack and in its document.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    counts = ((lengths - l).div(d, rounding_mode="floor") + 1).clamp(min=0)  # whole blocks only
    cu_blocks = F.pad(counts.cumsum(0), (1, 0))
    place = (torch.arange(int(cu_blocks[-1])) - cu_blocks[:-1].repeat_interleave(counts)) * d
    return cu_blocks, starts.repeat_interleave(counts) + place, place


def compress_mlp(x: Tensor, first: Tensor, pe: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """phi of Eq. 7: x [n, h, e] -> [m, h, e] for the blocks whose first tokens are `first` [m].

    Adds the position encoding pe [l, e], then two layers with a GELU between them over the flattened block:
    w1 [hidden, l * e] over (token, channel), w2 [e, hidden]. Shared over heads.
    """
    blocks = _windows(x, first, len(pe)) + pe[:, None]
    return F.linear(F.gelu(F.linear(blocks.transpose(1, 2).flatten(2), w1, b1)), w2, b2)


def compress_mean(x: Tensor, first: Tensor, l: int) -> Tensor:
    """The mean of each block: x [n, h, e] -> [m, h, e]."""
    return _windows(x, first, l).mean(dim=1)


def _windows(x: Tensor, first: Tensor, l: int) -> Tensor:
    """[n, h, e] -> [m, l, h, e]."""
    return x[(first[:, None] + torch.arange(l, device=first.device)).to(x.device, non_blocking=True)]


def nsa(
    q: Tensor,
    kv: dict[str, tuple[Tensor, Tensor]],
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor,
    a: Attention,
) -> Tensor:
    """Eq. 5: the gated sum of the branches, o [n, h, dv]. Arguments as in nsa.attention.nsa_attention."""
    dtype = q.dtype
    q, k_cmp, v_cmp, gates = (_wide(x) for x in (q, k_cmp, v_cmp, gates))
    kv = {name: (_wide(k), _wide(v)) for name, (k, v) in kv.items()}
    cu_blocks = block_starts(cu_seqlens, a.l, a.d)[0].tolist()
    out = []
    for i, (s, e) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
        own = {name: (k[s:e], v[s:e]) for name, (k, v) in kv.items()}
        blocks = slice(cu_blocks[i], cu_blocks[i + 1])
        cmp = tuple(None if x is None else x[blocks] for x in (k_cmp, v_cmp))
        chunk = min(max(CHUNKS[0], (e - s) // 8), CHUNKS[1])
        for start in range(0, e - s, chunk):
            rows = slice(s + start, min(s + start + chunk, e))
            args = (q[rows], own, *cmp, gates[rows], start, a)
            again = e - s > KEEP and torch.is_grad_enabled()
            out.append(checkpoint(_chunk, *args, use_reentrant=False) if again else _chunk(*args))
    return torch.cat(out).to(dtype)


def _wide(x: Tensor | None) -> Tensor | None:
    return x.float() if x is not None and x.dtype in (torch.bfloat16, torch.float16) else x


def _chunk(
    q: Tensor,
    kv: dict[str, tuple[Tensor, Tensor]],
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    start: int,
    a: Attention,
) -> Tensor:
    """Consecutive queries of one document, the first at position `start`, against that document: [c, h, dv]."""
    end = start + len(q)
    branches: dict[Branch, Tensor] = {}
    p = None
    if Branch.cmp in a.branches:
        branches[Branch.cmp], p = compressed(q, k_cmp, v_cmp, start, a.l, a.d)
    if Branch.slc in a.branches:
        with torch.no_grad():
            if p is None:
                p = compressed(q, k_cmp, k_cmp[..., :1], start, a.l, a.d)[1]
            index = choose(importance(p.detach(), end, a.l, a.d, a.l_slc), start, a)
        k, v = kv["slc"]
        branches[Branch.slc] = selected(q, k[:end], v[:end], start, index, a.l_slc)
    if Branch.win in a.branches:
        k, v = kv["win"]
        branches[Branch.win] = window(q, k[:end], v[:end], start, a.w)
    return sum(gates[..., i, None] * branches[b] for i, b in enumerate(a.branches))


def compressed(q: Tensor, k: Tensor, v: Tensor, start: int, l: int, d: int) -> tuple[Tensor, Tensor]:
    """The compressed branch (Eq. 7, 8) of consecutive queries q [c, h, dk] from position `start` on.

    k [m, h_kv, dk], v [m, h_kv, dv] are the document's compressed blocks; a query sees those that end at or before it.
    Returns o [c, h, dv] and p_cmp [h_kv, g, c, m], both zero and without a gradient before the end of the first block.
    """
    early = min(len(q), max(0, l - 1 - start)) if len(k) else len(q)
    o = q.new_zeros(early, q.shape[1], v.shape[2])
    p = q.new_zeros(k.shape[1], q.shape[1] // k.shape[1], early, len(k))
    if early == len(q):
        return o, p
    ends = torch.arange(len(k), device=q.device) * d + l - 1
    late_o, late_p = _attend(q[early:], k, v, ends <= _positions(q, start)[early:, None])
    return torch.cat((o, late_o)), torch.cat((p, late_p), dim=2)


def importance(p_cmp: Tensor, length: int, l: int, d: int, l_slc: int) -> Tensor:
    """Eq. 9 and 10: p_cmp [h_kv, g, c, m] -> scores [h_kv, c, ceil(length / l_slc)] of the selection blocks.

    A compression block counts for a selection block once for each stride cell that both cover; that is what the paper's
    double sum, whose indices run from 1, comes to.
    """
    first = torch.arange(p_cmp.shape[-1])[:, None]  # in cells of d tokens
    block = torch.arange(-(-length // l_slc)) * (l_slc // d)
    shared = torch.minimum(first + l // d, block + l_slc // d) - torch.maximum(first, block)
    return p_cmp.sum(dim=1) @ shared.clamp(min=0).to(p_cmp)


def choose(scores: Tensor, start: int, a: Attention) -> Tensor:
    """Eq. 11: block indices [h_kv, c, n], ascending, -1 behind them where a query sees fewer than n blocks.

    scores [h_kv, c, blocks] of consecutive queries from position `start` on. The first `initial` blocks and the `local`
    ones that end with the query's own are always taken; ties go to the smaller index.
    """
    count = scores.shape[-1]
    block = torch.arange(count, device=scores.device)
    own = torch.arange(start, start + scores.shape[1], device=scores.device)[:, None] // a.l_slc
    forced = (block < a.initial) | (block > own - a.local)
    scores = scores.masked_fill(forced, math.inf).masked_fill(block > own, -math.inf)
    best = scores.sort(dim=-1, descending=True, stable=True)
    index = best.indices.masked_fill(best.values == -math.inf, count)[..., : a.n].sort(dim=-1).values
    index = F.pad(index, (0, max(0, a.n - count)), value=count)
    return index.masked_fill(index == count, -1)


def selected(q: Tensor, k: Tensor, v: Tensor, start: int, index: Tensor, l_slc: int) -> Tensor:
    """The selected branch (Eq. 12): q [c, h, dk] from position `start` on -> [c, h, dv].

    k [m, h_kv, dk], v [m, h_kv, dv] are the document's tokens up to the last query, index [h_kv, c, n] from `choose`.
    """
    count = -(-len(k) // l_slc)
    chosen = torch.zeros(*index.shape[:2], count + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter(-1, index.where(index >= 0, count), True)[..., :count]  # [h_kv, c, blocks]
    mask = chosen.repeat_interleave(l_slc, dim=-1)[..., : len(k)]
    mask = mask & (torch.arange(len(k), device=q.device) <= _positions(q, start)[:, None])
    return _attend(q, k, v, mask[:, None])[0]


def window(q: Tensor, k: Tensor, v: Tensor, start: int, w: int) -> Tensor:
    """The window branch: each query sees w tokens, its own included. Arguments as in `selected`."""
    first = max(0, start - w + 1)
    distance = _positions(q, start)[:, None] - torch.arange(first, len(k), device=q.device)
    return _attend(q, k[first:], v[first:], (distance >= 0) & (distance < w))[0]


def _positions(q: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + len(q), device=q.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention (Eq. 1) in which every query sees a key: o [c, h, dv], probabilities [h_kv, g, c, m].

    mask broadcasts to [h_kv, g, c, m].
    """
    grouped = (q * q.shape[2] ** -0.5).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3)  # [h_kv, g, c, dk]
    size = grouped.shape[1:3]
    scores = (grouped.flatten(1, 2) @ k.permute(1, 2, 0)).unflatten(1, size)
    p = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    o = (p.flatten(1, 2) @ v.transpose(0, 1)).unflatten(1, size)  # [h_kv, g, c, dv]
    return o.permute(2, 0, 1, 3).flatten(1, 2), p
