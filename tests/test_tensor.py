"""Parallel layers against the plain torch layer made of the same whole weights: outputs, input and weight gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel import init, mesh
from parallel.mlp import MLP
from parallel.tensor import RMSNorm, TensorParallel, VocabEmbedding
from tests import ranks, tiny

MODEL = tiny.config().model
N, VOCAB = 12, 32


def tensor_parallel(sequence: bool) -> TensorParallel:
    return TensorParallel(mesh.build(torch.distributed.get_world_size(), 1).tp, sequence)


def filled(module: nn.Module, tp: TensorParallel) -> nn.Module:
    init.initialize(module, MODEL, 0, tp.group)
    return module


def whole(name: str, *shape: int) -> torch.Tensor:
    return init.initial(name, shape, MODEL, 0).requires_grad_()


def inputs() -> torch.Tensor:
    return torch.randn(N, MODEL.dim, generator=torch.Generator().manual_seed(1))


def part(x: torch.Tensor, tp: TensorParallel) -> torch.Tensor:
    return x.chunk(tp.group.size)[tp.group.rank] if tp.sequence else x


def run_mlp(sequence: bool):
    tp = tensor_parallel(sequence)
    mlp = filled(MLP(MODEL, tp), tp)
    x = part(inputs(), tp).clone().requires_grad_()
    y = mlp(x)
    (y * part(inputs().cos(), tp)).sum().backward()
    return y.detach(), x.grad, mlp.gate.weight.grad, mlp.down.weight.grad


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_mlp(world, sequence):
    x = inputs().requires_grad_()
    gate, up = (whole(f"{n}.weight", MODEL.mlp_dim, MODEL.dim) for n in ("gate", "up"))
    down = whole("down.weight", MODEL.dim, MODEL.mlp_dim)
    y = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    (y * inputs().cos()).sum().backward()
    parts = ranks.run(world, run_mlp, sequence)
    together = [torch.cat(p) if sequence else p[0] for p in list(zip(*parts))[:2]]
    gates, downs = torch.cat([p[2] for p in parts]), torch.cat([p[3] for p in parts], dim=1)
    for ours, plain in zip((*together, gates, downs), (y, x.grad, gate.grad, down.grad)):
        torch.testing.assert_close(ours, plain.detach(), rtol=1e-5, atol=1e-6)


def run_embedding(sequence: bool):
    tp = tensor_parallel(sequence)
    embedding = filled(VocabEmbedding(VOCAB, MODEL.dim, tp), tp)
    y = embedding(torch.arange(N) * 5 % VOCAB)
    (y * part(inputs(), tp)).sum().backward()
    return y.detach(), embedding.weight.grad


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("world", [1, 4])
def test_embedding(world, sequence):
    table = whole("weight", VOCAB, MODEL.dim)
    y = F.embedding(torch.arange(N) * 5 % VOCAB, table)
    (y * inputs()).sum().backward()
    parts = ranks.run(world, run_embedding, sequence)
    torch.testing.assert_close(torch.cat([p[0] for p in parts]) if sequence else parts[0][0], y.detach())
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), table.grad)


def run_norm(sequence: bool):
    tp = tensor_parallel(sequence)
    norm = RMSNorm(MODEL.dim, MODEL.norm_eps, tp)
    nn.init.constant_(norm.weight, 1.5)
    y = norm(part(inputs(), tp))
    (y * part(inputs().cos(), tp)).sum().backward()
    return y.detach(), norm.weight.grad


@pytest.mark.parametrize("sequence", [False, True])
def test_norm_weight_sees_every_token_on_every_rank(sequence):
    weight = torch.full((MODEL.dim,), 1.5, requires_grad=True)
    x = inputs()
    y = x * (x.pow(2).mean(dim=1, keepdim=True) + MODEL.norm_eps).rsqrt() * weight
    (y * x.cos()).sum().backward()
    for rank, (part_y, grad) in enumerate(ranks.run(2, run_norm, sequence)):
        torch.testing.assert_close(part_y, y.detach().chunk(2)[rank] if sequence else y.detach())
        torch.testing.assert_close(grad, weight.grad)
