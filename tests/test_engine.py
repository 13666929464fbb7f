"""The engine's choices. What it computes is compared in test_parity.py, what it saves in test_pieces.py."""

import torch

from configs.schema import Config, Precision
from parallel import mesh
from parallel.engine import deepspeed_config, optimizer
from parallel.transformer import Transformer
from tests import ranks, tiny
from tests.test_checkpoint import VOCAB


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
