"""Tied embeddings: every layout trains as one process does, and both ends of a pipeline keep one weight."""

import pytest
import torch

from configs.errors import CheckpointError
from configs.schema import Config, Precision, Recompute, Resume
from parallel import checkpoint, mesh, pieces, tied
from parallel.comm import host_gather
from parallel.engine import Engine
from parallel.norms import parameter_norms
from tests import ranks, tiny
from tests.test_checkpoint import build, saver
from tests.test_parity import VOCAB, train
from tests.test_pieces import equal, go_on, save, small
from train import describe

LAYOUTS = [
    (2, {"tp": 2, "sequence": True, "recompute": Recompute.full}),
    (2, {"pp": 2}),
    (4, {"tp": 2, "pp": 2}),
    (2, {"zero": 2}),
    (2, {"zero": 3}),
]


@pytest.fixture(scope="module")
def one_process(corpus):
    cfg = tiny.config("nsa", data__path=corpus, model__tie_embeddings=True)
    (out,) = ranks.run(1, train, cfg)
    (untied,) = ranks.run(1, train, tiny.change(cfg, model__tie_embeddings=False))
    assert out[0][1] != pytest.approx(untied[0][1], rel=1e-3), "tying shows in the gradient"
    return cfg, out


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_layout(one_process, world, layout):
    cfg, expected = one_process
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(world, train, cfg):
        for step, (ours, theirs) in enumerate(zip(out, expected)):
            assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"


@pytest.fixture(scope="module")
def one_process_in_bf16(one_process):
    cfg = tiny.change(one_process[0], train__precision=Precision.bf16)
    return cfg, ranks.run(1, train, cfg, 3)[0]


@pytest.mark.parametrize("layout", [{"zero": 1}, {"zero": 2}, {"zero": 3}, {"tp": 2}], ids=str)
def test_layout_in_bf16(one_process_in_bf16, layout):
    cfg, expected = one_process_in_bf16
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(2, train, cfg, 3):
        for ours, theirs in zip(out, expected):
            assert ours == pytest.approx(theirs, rel=2e-3)


@pytest.mark.parametrize("layout", [{}, {"parallel__zero": 3}], ids=str)
def test_both_layers_have_one_parameter(layout):
    def names() -> list[str]:
        cfg = tiny.config("full", model__tie_embeddings=True, model__layers=1, **layout)
        return [name for name, _ in Engine(cfg, VOCAB, mesh.build(1, 1)).deepspeed.module.named_parameters()]

    (found,) = ranks.run(1, names)
    assert tied.EMBEDDING in found
    assert not [name for name in found if "output" in name]


def both_ends(cfg: Config) -> tuple[list[tuple[float, float]], list[torch.Tensor], dict]:
    """Steps in which data-parallel ranks add up, then the weight of each end of the pipeline, and norms by name."""
    engines, norms, real = [], {}, Engine._watched_update

    def update(self, *args, **kwargs):
        engines.append(self)
        norms.update(parameter_norms(self.deepspeed.module, self.mesh))
        return real(self, *args, **kwargs)

    Engine._watched_update = update
    out = train(cfg, 3)
    weight = tied.at_an_end(engines[0].deepspeed.module, engines[0].mesh.pp)
    ends = host_gather(None if weight is None else weight.detach().float(), engines[0].mesh)
    return out, [end for end in ends if end is not None], norms


@pytest.mark.parametrize("precision", [Precision.fp32, Precision.bf16], ids=str)
def test_the_ends_of_a_pipeline_stay_the_same_to_the_bit(corpus, precision):
    cfg = tiny.config("full", data__path=corpus, model__tie_embeddings=True, train__precision=precision)
    (expected,) = ranks.run(1, train, cfg, 3)
    out, ends, norms = ranks.run(4, both_ends, tiny.change(cfg, parallel__pp=2))[0]
    for ours, theirs in zip(out, expected):
        assert ours == pytest.approx(theirs, rel=1e-5 if precision is Precision.fp32 else 0.01)
    assert len(ends) == 4
    assert all(torch.equal(ends[0], end) for end in ends[1:])
    assert tied.EMBEDDING in norms
    assert not [name for name in norms if "output" in name]


CUT = {"parallel__tp": 2, "parallel__pp": 2}
TP, PP = (2, {"parallel__tp": 2}), (2, {"parallel__pp": 2})
OTHERS = [((4, CUT), (1, {})), ((2, {"parallel__zero": 3}), (4, CUT)), (PP, TP), (TP, PP)]


@pytest.mark.parametrize(("source", "target"), OTHERS, ids=str)
def test_another_layout_continues(corpus, tmp_path, source, target):
    (world, one), (other, two) = source, target
    state, after = ranks.run(world, save, small(corpus, "full", model__tie_embeddings=True, **one), tmp_path / "a")[0]
    assert not [name for name in pieces.Reader(tmp_path / "a").places if "output" in name], "it is there once"
    cfg = small(corpus, "full", model__tie_embeddings=True, **two)
    for out in ranks.run(other, go_on, cfg, tmp_path / "a", state, tmp_path / "b"):
        assert out[0] == pytest.approx(after[0], rel=1e-5)
    assert equal(tmp_path / "a", tmp_path / "b")


def save_as_a_run(cfg: Config) -> None:
    place, _, engine = build(cfg)
    keeper, _ = saver(cfg, place, engine)
    keeper.save(1, {**describe(cfg, place, VOCAB), "step": 1, "tokens": 0})
    keeper.wait(last=True)


@pytest.mark.parametrize("flag", [False, True])
def test_a_run_with_the_other_flag_does_not_continue(corpus, tmp_path, flag):
    cfg = small(corpus, "full", run__dir=str(tmp_path / "run"), model__tie_embeddings=flag)
    ranks.run(1, save_as_a_run, cfg)

    def find(cfg: Config) -> str:
        place = mesh.build(1, 1)
        try:
            return checkpoint.find(tmp_path / "run", place, Resume.auto, describe(cfg, place, VOCAB))[0]
        except CheckpointError as e:
            return f"{e.code} {e}"

    assert ranks.run(2, find, cfg) == [str(tmp_path / "run/checkpoints/step-00000001")] * 2
    for says in ranks.run(2, find, tiny.change(cfg, model__tie_embeddings=not flag)):
        assert says.startswith("66 error: checkpoint")
        assert f"model.tie_embeddings={flag}, this run has {not flag}; give model.tie_embeddings={flag}" in says
        assert "\n" not in says
