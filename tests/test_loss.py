"""Vocab-parallel cross entropy against torch's own on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from parallel import mesh
from parallel.loss import IGNORE, CrossEntropy
from tests import ranks

N, VOCAB = 9, 24


def case(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, VOCAB, (N,), generator=generator)
    labels[[0, 4]] = IGNORE
    labels[[1, 2]] = torch.tensor([0, VOCAB - 1])
    return torch.randn(N, VOCAB, generator=generator) * scale, labels


def body(scale: float) -> tuple[float, torch.Tensor]:
    group = mesh.build(torch.distributed.get_world_size(), 1).tp
    logits, labels = case(scale)
    mine = logits.chunk(group.size, dim=1)[group.rank].clone().requires_grad_()
    loss = CrossEntropy(group)(mine, labels)
    (loss * 0.5).backward()
    return loss.item(), mine.grad


@pytest.mark.parametrize("scale", [1.0, 300.0])  # the larger overflows exp unless the maximum of all ranks is taken off
@pytest.mark.parametrize("world", [1, 2, 4])
def test_equals_torch(world, scale):
    logits, labels = case(scale)
    logits.requires_grad_()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    (loss * 0.5).backward()
    parts = ranks.run(world, body, scale)
    assert all(p[0] == pytest.approx(loss.item(), rel=1e-6) for p in parts)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], dim=1), logits.grad, rtol=1e-5, atol=1e-7)


def no_labels() -> tuple[float, float]:
    group = mesh.build(1, 1).tp
    logits = case(1.0)[0].requires_grad_()
    loss = CrossEntropy(group)(logits, torch.full((N,), IGNORE))
    loss.backward()
    return loss.item(), logits.grad.abs().max().item()


def test_nothing_to_predict_is_no_loss_and_no_gradient():
    assert ranks.run(1, no_labels) == [(0.0, 0.0)]
