"""How sparse attention behaves: which branches the gates open, and where the selected blocks lie."""

import math

import torch
from torch import Tensor

from configs.schema import Attention, Branch
from nsa import reference

SPREAD, RUN = 8, 16  # so many runs of so many neighbouring queries are looked at


@torch.no_grad()
def measure(q: Tensor, k_cmp: Tensor | None, gates: Tensor, cu_seqlens: Tensor, a: Attention) -> dict[str, float]:
    """Of one layer and one pass, arguments as in nsa.attention.nsa_attention. Waits for the device.

    gate_BRANCH: mean gate over tokens and heads. The rest, where blocks are selected, is of queries spread over the
    longest document, in fp32, by the scores that select, and is left out where it has no meaning:
    far: share of the blocks chosen by score (the forced ones do not count) that have no token within the last w;
    entropy: of a query's scores over the blocks it sees, 0 where one has all, 1 where all are equal;
    overlap: share of a query's blocks, forced ones included, that the next query has too.
    """
    out = {f"gate_{b.value}": gates[..., i].float().mean().item() for i, b in enumerate(a.branches)}
    if Branch.slc not in a.branches:
        return out
    document = int(cu_seqlens.diff().argmax())
    first, end = cu_seqlens[document : document + 2].tolist()
    cu_blocks = reference.block_starts(cu_seqlens, a.l, a.d)[0]
    keys = k_cmp[cu_blocks[document] : cu_blocks[document + 1]].float()
    found = [_queries(q[first + s : first + e].float(), keys, s, a) for s, e in _runs(end - first)]
    for name in ("far", "entropy", "overlap"):
        values = torch.cat([run[name] for run in found])
        if len(values):
            out[name] = values.mean().item()
    return out


def _runs(length: int) -> list[tuple[int, int]]:
    """Where the queries to look at start and end, evenly over a document, without the same query twice."""
    ends = sorted({max(1, length * (i + 1) // SPREAD) for i in range(SPREAD)})
    before = [0, *ends]
    return [(max(start, end - RUN), end) for start, end in zip(before, ends)]


def _queries(q: Tensor, k_cmp: Tensor, start: int, a: Attention) -> dict[str, Tensor]:
    """Neighbouring queries q [c, h, dk] from position `start` on: each measure as a flat tensor of values."""
    end = start + len(q)
    p = reference.compressed(q, k_cmp, k_cmp[..., :1], start, a.l, a.d)[1]
    scores = reference.importance(p, end, a.l, a.d, a.l_slc)  # [h_kv, c, blocks]
    chosen = _mask(reference.choose(scores, start, a), scores.shape[-1])
    position = torch.arange(start, end, device=q.device)[:, None]
    block = torch.arange(scores.shape[-1], device=q.device)
    own = position // a.l_slc
    free = chosen & (block >= a.initial) & (block <= own - a.local)
    far = (block + 1) * a.l_slc <= position - a.w + 1
    shared = (chosen[:, 1:] & chosen[:, :-1]).sum(-1) / chosen[:, :-1].sum(-1)
    return {"far": far.expand_as(free)[free].float(), "entropy": _entropy(scores, own), "overlap": shared.flatten()}


def _mask(index: Tensor, blocks: int) -> Tensor:
    """Block indices [h_kv, c, n], -1 for none, as a mask [h_kv, c, blocks]."""
    mask = torch.zeros(*index.shape[:2], blocks + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(-1, index.where(index >= 0, blocks), True)[..., :blocks]


def _entropy(scores: Tensor, own: Tensor) -> Tensor:
    """Of the queries that see several blocks and have scores: entropy over its maximum, flat."""
    total = scores.sum(-1, keepdim=True)
    share = scores / total.clamp(min=1e-30)
    entropy = torch.special.entr(share).sum(-1) / (own[:, 0] + 1).float().log().clamp(min=math.log(2))
    return entropy[(total[..., 0] > 0) & (own[:, 0] > 0)]
