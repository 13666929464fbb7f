"""Every layout trains like one process: ten steps on packed rows give its losses and gradient norms, and the same
held-out loss after them. Every rank reads from a loader of its own, as in a run.
"""

import pytest

from configs.schema import Config, Recompute
from data.loader import Loader
from parallel import engine, mesh
from parallel.comm import host_sum
from parallel.engine import Engine
from parallel.schedule import learning_rate
from tests import ranks, tiny

STEPS, VOCAB = 10, 512


def train(cfg: Config, steps: int = STEPS) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, then (held-out loss, documents in the last batch)."""
    place = mesh.build(cfg.parallel.tp, cfg.parallel.pp)
    engine = Engine(cfg, VOCAB, place)

    def loader(split: str) -> Loader:
        rows = (cfg.data.seq_len, cfg.train.global_batch, cfg.train.micro_batch, cfg.seed)
        return Loader(cfg.data.path, split, *rows, place.dp.rank, place.dp.size)

    def count(batches) -> int:
        labels = sum(int((b.labels >= 0).sum()) for b in batches)
        return host_sum([labels], place)[0] // (place.tp.size * place.pp.size)

    out, rows = [], loader("train")
    for step in range(steps):
        batches = rows.next_step()
        loss, norm = engine.train_step(batches, count(batches), learning_rate(step, steps, cfg.optim))
        out.append((float(loss), float(norm)))
    held_out = loader("val").next_step()
    out.append((float(engine.eval_step(held_out, count(held_out))), 0.0))
    return out


def rarely(world: int, layout: dict):
    """Others have each of its parts."""
    return pytest.param(world, layout, marks=pytest.mark.slow)


LAYOUTS = [
    (4, {"tp": 2, "pp": 2}),
    (4, {"tp": 2, "pp": 2, "sequence": True, "recompute": Recompute.full}),
    (4, {"tp": 2}),
    (4, {"tp": 2, "sequence": True, "zero": 2, "recompute": Recompute.full}),
    (4, {"tp": 2, "sequence": True, "zero": 3}),
    (4, {"pp": 2}),
    (4, {"pp": 2, "recompute": Recompute.full}),
    rarely(4, {"tp": 4}),
    rarely(4, {"tp": 4, "sequence": True, "recompute": Recompute.full}),
    (4, {"pp": 4}),
    rarely(4, {"pp": 4, "recompute": Recompute.full}),
    (4, {"zero": 1}),
    (4, {"zero": 2}),
    (4, {"zero": 3}),
    rarely(4, {"zero": 3, "recompute": Recompute.full}),
    (2, {"zero": 3, "compile": True}),
    rarely(2, {"zero": 3, "recompute": Recompute.mlp, "compile": True}),
    rarely(4, {"tp": 2, "sequence": True, "zero": 3, "recompute": Recompute.full, "compile": True}),
    rarely(2, {"tp": 2, "sequence": True, "recompute": Recompute.full, "compile": True}),
    rarely(2, {"tp": 2, "sequence": True, "recompute": Recompute.mlp, "compile": True}),
    (2, {"pp": 2, "recompute": Recompute.mlp}),
    rarely(8, {"tp": 2, "pp": 2}),
    (8, {"tp": 2, "pp": 2, "sequence": True, "recompute": Recompute.full}),
]


@pytest.fixture(scope="module", params=["nsa", "full"])
def one_process(request, corpus):
    """The run of one process that all others are compared with."""
    cfg = tiny.config(request.param, data__path=corpus)
    (out,) = ranks.run(1, train, cfg)
    assert out[STEPS - 1][0] < out[0][0] - 0.1, "it has to learn something, or equal losses say little"
    assert max(norm for _, norm in out) > cfg.optim.clip, "and to clip"
    return cfg, out


@pytest.mark.parametrize(("world", "layout"), LAYOUTS, ids=str)
def test_layout(one_process, world, layout):
    cfg, expected = one_process
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(world, train, cfg):
        for step, (ours, theirs) in enumerate(zip(out, expected)):
            assert ours == pytest.approx(theirs, rel=1e-5), f"step {step}"


def test_rows_hold_several_documents(corpus):
    cfg = tiny.config()
    loader = Loader(corpus, "train", cfg.data.seq_len, cfg.train.global_batch, 1, cfg.seed)
    documents = [len(b.cu_seqlens) - 1 for _ in range(STEPS) for b in loader.next_step()]
    assert sum(n > 1 for n in documents) > len(documents) / 3


def test_micro_batches_only_cut_the_work(one_process):
    cfg, expected = one_process
    (out,) = ranks.run(1, train, tiny.change(cfg, train__micro_batch=4))
    for ours, theirs in zip(out, expected):
        assert ours == pytest.approx(theirs, rel=1e-5)


def train_in_small_buckets(cfg: Config) -> list[tuple[float, float]]:
    """`train`, where DeepSpeed sends gradients on their way several times a step, as it does those of a large model."""
    real = engine.deepspeed_config

    def small(*args):
        out = real(*args)
        out["zero_optimization"]["reduce_bucket_size"] = 20_000
        return out

    engine.deepspeed_config = small
    return train(cfg, 3)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"parallel__zero": 2}),
        (2, {"parallel__zero": 3}),
        (2, {"parallel__zero": 3, "model__tie_embeddings": True}),
        rarely(4, {"parallel__zero": 3, "parallel__tp": 2, "parallel__sequence": True, "model__tie_embeddings": True}),
    ],
    ids=str,
)
def test_gradients_of_a_large_model(one_process, world, layout):
    cfg = tiny.change(one_process[0], **layout)
    alone = tiny.change(cfg, parallel=tiny.config().parallel)
    (expected,) = ranks.run(1, train, alone, 3)
    for out in ranks.run(world, train_in_small_buckets, cfg):
        for ours, theirs in zip(out, expected):
            assert ours == pytest.approx(theirs, rel=1e-5)
