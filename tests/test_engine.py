"""The engine's choices, and DeepSpeed's universal checkpoint: what one layout saved, another continues."""

import subprocess
import sys

import pytest
import torch

from configs.schema import Config, Precision
from parallel import mesh
from parallel.engine import deepspeed_config, optimizer
from parallel.transformer import Transformer
from tests import ranks, tiny
from tests.test_checkpoint import VOCAB, build, steps

UNIVERSAL = "deepspeed.checkpoint.ds_to_universal"


def save(cfg: Config) -> tuple[dict, list[tuple[float, float]]]:
    place, loader, engine = build(cfg)
    steps(2, place, loader, engine)
    engine.save(cfg.run.dir, "two", {})
    return loader.state_dict(), steps(2, place, loader, engine, 2)


def go_on(cfg: Config, state: dict) -> list[tuple[float, float]]:
    place, loader, engine = build(cfg)
    engine.deepspeed._config.load_universal_checkpoint = True
    engine.load(cfg.run.dir, "universal")
    loader.load_state_dict(state)
    return steps(2, place, loader, engine, 2)


@pytest.fixture(scope="module", params=["nsa", "full"])
def universal(request, corpus, tmp_path_factory):
    """Two steps at tp2 x pp2, converted, and the two that followed."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = tiny.config(request.param, data__path=corpus, run__dir=str(folder), model__layers=2)
    state, after = ranks.run(4, save, tiny.change(cfg, parallel__tp=2, parallel__pp=2))[0]
    paths = ["--input_folder", str(folder / "two"), "--output_folder", str(folder / "universal")]
    convert = [sys.executable, "-m", UNIVERSAL, *paths, "--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(convert, check=True, capture_output=True)
    return cfg, state, after


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, {"tp": 2, "sequence": True}), (2, {"pp": 2}), (4, {"tp": 4})], ids=str
)
def test_another_layout_continues_a_universal_checkpoint(universal, world, layout):
    cfg, state, after = universal
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(world, go_on, cfg, state):
        for ours, theirs in zip(out, after):
            assert ours == pytest.approx(theirs, rel=1e-5)


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
