"""The health of sparse attention in every layout: each layer once, the numbers of one process, no trace left."""

import pytest

from configs.schema import Config, Recompute
from nsa import NSACore
from parallel.health import Watch
from tests import ranks, tiny
from tests.test_checkpoint import build, steps


def watched(cfg: Config) -> tuple[dict[str, float], list[tuple[float, float]], bool]:
    """What a watched first step showed, its loss and the next one's, and whether a layer is still being watched."""
    place, loader, engine = build(cfg)
    watch = Watch(engine.deepspeed.module, cfg.attention)
    results = steps(2, place, loader, engine)
    left = any(m.observe for m in engine.deepspeed.module.modules() if isinstance(m, NSACore))
    return watch.read(place), results, left


def unwatched(cfg: Config) -> list[tuple[float, float]]:
    place, loader, engine = build(cfg)
    return steps(2, place, loader, engine)


def config(corpus: str, kind: str = "nsa", **layout) -> Config:
    changes = {f"parallel__{k}": v for k, v in layout.items()}
    return tiny.config(kind, data__path=corpus, data__seq_len=256, model__layers=2, **changes)


@pytest.fixture(scope="module")
def alone(corpus):
    return ranks.run(1, watched, config(corpus))[0]


def test_each_layer_has_each_measure(alone):
    names = ["entropy", "far", "gate_cmp", "gate_slc", "gate_win", "overlap"]
    assert list(alone[0]) == [f"sparsity/{name}/layer_{layer:02}" for name in names for layer in (0, 1)]
    assert all(0 <= v <= 1 for v in alone[0].values())


def test_a_watched_step_is_the_same_step(alone, corpus):
    assert alone[1] == ranks.run(1, unwatched, config(corpus))[0]
    assert not alone[2]


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2, "sequence": True, "recompute": Recompute.full}], ids=str)
def test_tensor_and_pipeline_parallel_see_what_one_process_sees(alone, corpus, layout):
    for seen, _, left in ranks.run(4, watched, config(corpus, **layout)):
        assert seen == pytest.approx(alone[0], abs=1e-5)
        assert not left


def test_data_parallel_ranks_are_averaged(alone, corpus):
    first, second = (seen for seen, _, _ in ranks.run(2, watched, config(corpus, zero=3)))
    assert first == second
    assert set(first) == set(alone[0])


def test_full_attention_has_none(corpus):
    assert ranks.run(1, watched, config(corpus, "full"))[0][0] == {}
