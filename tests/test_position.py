"""Held-out loss by position: the parts make the whole, in every layout."""

import pytest

from configs.schema import Config
from parallel.position import LossByPosition
from tests import ranks, tiny
from tests.test_checkpoint import build


def evaluated(cfg: Config) -> tuple[dict[str, float], float, list[float]]:
    """By position, the mean loss, and how many labels each of the buckets has on this rank's rows."""
    place, loader, engine = build(cfg)
    watch = LossByPosition(engine.deepspeed.module, engine.loss_of, place, cfg.data.seq_len)
    total = 0.0
    for _ in range(2):
        batches = loader.next_step()
        watch.expect([b.labels for b in batches])
        targets = sum(int((b.labels >= 0).sum()) for b in batches) * place.dp.size
        total += float(engine.eval_step(batches, targets)) * targets
    counts = watch.sums[1].tolist()
    found = watch.read()
    batches = loader.next_step()
    engine.eval_step(batches, 1)  # nobody listens any more
    return found, total, counts


def config(corpus: str, **layout) -> Config:
    return tiny.config(data__path=corpus, model__layers=2, **{f"parallel__{k}": v for k, v in layout.items()})


@pytest.fixture(scope="module")
def alone(corpus):
    return ranks.run(1, evaluated, config(corpus))[0]


def test_buckets_halve_the_row(alone):
    assert list(alone[0]) == [f"val_loss_from/{edge:06}" for edge in (0, 3, 6, 12, 24, 48)]


def test_the_parts_make_the_whole(alone):
    found, total, counts = alone
    assert sum(loss * n for loss, n in zip(found.values(), counts)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2, "sequence": True}], ids=str)
def test_layouts_agree(alone, corpus, layout):
    for found, _, _ in ranks.run(4, evaluated, config(corpus, **layout)):
        assert found == pytest.approx(alone[0], rel=1e-5)


def test_data_parallel_ranks_are_put_together(alone, corpus):
    for found, _, _ in ranks.run(2, evaluated, config(corpus)):
        assert found == pytest.approx(alone[0], rel=1e-5)
