"""First weights are a function of (seed, name), whatever the layout."""

import math

import torch

from parallel import init
from parallel.mesh import Group
from parallel.tensor import ColumnLinear, RowLinear, TensorParallel
from tests import tiny

MODEL = tiny.config().model


def test_shards_are_parts_of_the_whole():
    for layer, dim in ((ColumnLinear, 0), (RowLinear, 1)):
        shards = []
        for rank in range(4):
            tp = TensorParallel(Group(None, rank, 4), sequence=False)
            module = layer(16, 8, tp)
            init.initialize(module, MODEL, 7, tp.group)
            shards.append(module.weight.detach())
        assert torch.equal(torch.cat(shards, dim), init.initial("weight", (8, 16), MODEL, 7))


def test_seed_and_name_both_count():
    a = init.initial("1.mlp.up.weight", (64, 64), MODEL, 0)
    assert torch.equal(a, init.initial("1.mlp.up.weight", (64, 64), MODEL, 0))
    assert not torch.equal(a, init.initial("1.mlp.up.weight", (64, 64), MODEL, 1))
    assert not torch.equal(a, init.initial("2.mlp.up.weight", (64, 64), MODEL, 0))


def test_scales():
    shape = (256, 256)
    expected = {
        "1.attention.wq.weight": MODEL.init_std,
        "1.attention.wo.weight": MODEL.init_std / math.sqrt(2 * MODEL.layers),
        "1.mlp.down.weight": MODEL.init_std / math.sqrt(2 * MODEL.layers),
        "1.attention.core.phi_k.w1": 1 / 16,
    }
    for name, std in expected.items():
        assert abs(init.initial(name, shape, MODEL, 0).std().item() / std - 1) < 0.02, name
    assert init.initial("3.attention_norm.weight", (5,), MODEL, 0).tolist() == [1.0] * 5
    assert init.initial("1.attention.core.phi_v.b1", (5,), MODEL, 0).tolist() == [0.0] * 5
