"""The engine's choices. What it computes is compared in test_parity.py, what it saves in test_pieces.py."""

from functools import partial
from unittest import mock

import pytest
import torch

from configs.schema import Config, Precision
from parallel import mesh
from parallel.engine import deepspeed_config, optimizer
from parallel.transformer import Transformer
from tests import ranks, tiny
from tests.test_checkpoint import VOCAB
from tests.test_parity import train


def groups(cfg: Config) -> list[list[str]]:
    model = Transformer(cfg, VOCAB, mesh.build(1, 1))
    names = {id(p): name for name, p in model.named_parameters()}
    made = optimizer(model, cfg.optim, torch.device("cpu"))
    assert [g["weight_decay"] for g in made.param_groups] == [cfg.optim.weight_decay, 0.0]
    return [[names[id(p)] for p in g["params"]] for g in made.param_groups]


def test_only_matrices_decay():
    decay, rest = ranks.run(1, groups, tiny.config())[0]
    assert len(decay) + len(rest) == len(set(decay + rest))
    assert "1.attention.wq.weight" in decay
    assert "1.attention.core.phi_k.w1" in decay
    assert {"1.attention.core.phi_v.pe", "1.attention.core.phi_k.b2", "1.mlp_norm.weight", "5.norm.weight"} <= set(rest)


def test_bf16_accumulates_in_fp32():
    place = mesh.Mesh(0, 4, torch.device("cpu"), *[mesh.Group(None, 0, 1)] * 4, control=None)
    out = deepspeed_config(tiny.config(train__precision=Precision.bf16), place)
    assert out["bf16"]["enabled"]
    assert out["data_types"] == {"grad_accum_dtype": "fp32"}
    assert out["gradient_accumulation_steps"] == 1
    assert "bf16" not in deepspeed_config(tiny.config(), place)


def graphs(cfg: Config) -> int:
    """How many pieces of code were compiled in two steps; what they are compiled to does not matter."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        train(cfg, 2)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_blocks_share_what_is_compiled(corpus: str, zero: int) -> None:
    """A block more is not one to compile more: past eight of one function torch compiles no other."""
    cfg = tiny.config("full", data__path=corpus, parallel__zero=zero, parallel__compile=True)
    few, many = (ranks.run(2, graphs, tiny.change(cfg, model__layers=n)) for n in (2, 5))
    assert few == many
    assert min(few) > 0


@pytest.mark.parametrize("zero", [1, 3])
def test_blocks_share_what_is_compiled(corpus, zero):
    check_blocks_share_what_is_compiled(corpus, zero)
