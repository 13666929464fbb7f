"""Norms of each whole parameter and its gradient, to see where in a model the numbers went wrong."""

from typing import Any

import torch
from torch import Tensor, nn

from parallel.comm import host_gather
from parallel.mesh import Mesh
from parallel.tied import is_copy


def parameter_norms(module: nn.Module, mesh: Mesh) -> dict[str, dict[str, float]]:
    """{name: {"weight": norm, "gradient": norm}} of the model, the same on every rank. Collective.

    To be called between the last backward of a step and DeepSpeed's update, while it holds the gradients. Each rank
    adds up the squares of the part that is its own; nothing is gathered but sums.
    """
    own = {name: _squares(p, mesh) for name, p in module.named_parameters() if not is_copy(p)}
    totals: dict[str, list[float]] = {}
    for part in host_gather(own, mesh):
        for name, squares in part.items():
            totals[name] = [a + b for a, b in zip(totals.get(name, [0.0, 0.0]), squares)]
    return {name: {"weight": w**0.5, "gradient": g**0.5} for name, (w, g) in sorted(totals.items())}


def _squares(p: Any, mesh: Mesh) -> list[float]:
    """Sums of squares of this rank's own part of the weight and of the gradient."""
    if mesh.tp.rank and not hasattr(p, "shard_dim"):  # replicated: counted once
        return [0.0, 0.0]
    if hasattr(p, "ds_tensor"):  # ZeRO 3 holds pieces of both
        weight, gradient = p.ds_tensor, p._z3_optimizer.get_local_fp32_grad_for_param(p)
    else:
        weight = p if mesh.dp.rank == 0 else p.new_zeros(1)
        gradient = _gradient_piece(p)
    return [float(x.detach().double().square().sum()) for x in (weight, gradient)]


def _gradient_piece(p: Any) -> Tensor:
    """The part of the gradient that ZeRO 1 or 2 updates on this rank."""
    if p._hp_mapping is None:
        return torch.zeros(1)
    piece = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).flatten()
    place = p._hp_mapping.lp_fragment_address
    # With fp32 accumulation beside bf16 each rank keeps the whole.
    return piece.narrow(0, place.start, place.numel) if piece.numel() == p.numel() else piece
