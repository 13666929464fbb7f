"""Rotary position embedding (arXiv 2104.09864), in fp32, on the two halves of a head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class Rope:
    """A table of angles for in-document positions 0 .. length-1.

    It is no module on purpose: a buffer would be cast to bf16 with the model, and bf16 holds no position above 256.
    """

    def __init__(self, dim: int, length: int, theta: float, device: torch.device, compiled: Callable = lambda f: f):
        frequency = theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
        angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * frequency  # [length, dim/2]
        self.cos, self.sin = angle.cos().float(), angle.sin().float()
        self.turn = compiled(_turn)

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x [n, heads, dim] by the angles of positions [n]; the dtype stays."""
        return _Turn.apply(x, self.cos, self.sin, positions, self.turn)


class _Turn(Function):
    """A gradient is turned back by the same angles. What is kept for that is not the compiler's choice: recomputation
    may meet a graph compiled since for other sizes, and has to keep the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, turn: Callable) -> Tensor:
        ctx.save_for_backward(cos, sin, positions)
        ctx.turn = turn
        return turn(x, cos, sin, positions)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        cos, sin, positions = ctx.saved_tensors
        return ctx.turn(dy, cos, -sin, positions), None, None, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    cos, sin = cos[positions][:, None], sin[positions][:, None]  # [n, 1, dim/2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
