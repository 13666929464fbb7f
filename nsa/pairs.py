"""The pairs (query, chosen block) in an order that brings those of one block together."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsa.score import NONE

RUN = 32  # pairs of a program forward; backward has BACK_RUN


@dataclass(frozen=True)
class Pairs:
    """All pairs in order of (chunk, KV head, block)."""

    keys: Tensor  # [n * h_kv * picks] int32, sorted
    order: Tensor  # the same places: which pair, (token * h_kv + KV head) * picks + pick, int32
    starts: Tensor  # [chunks * h_kv * blocks + 1] int32: where the pairs of a key start


def sort(chosen: Tensor, chunk: int, blocks: int) -> Pairs:
    """The pairs of chosen [n, h_kv, picks] from `score.choose`, in chunks of so many tokens."""
    n, groups, _ = chosen.shape
    first = torch.arange(n, dtype=torch.int32, device=chosen.device) // chunk * (groups * blocks)
    keys = (chosen + first[:, None, None]).where(chosen != NONE, NONE)
    keys, order = torch.sort(keys.flatten(), stable=True)
    every = torch.arange(triton.cdiv(n, chunk) * groups * blocks + 1, dtype=torch.int32, device=chosen.device)
    return Pairs(keys, order.int(), torch.searchsorted(keys, every, out_int32=True))
