"""Numbers that go wrong: a fault injected into the forward or backward pass of one rank leaves no trace anywhere."""

import json
import math

import pytest
import torch

from configs.schema import Config, Guard, OnSpike, Precision
from parallel import guard
from parallel.comm import host_sum
from parallel.transformer import Block, Head
from tests import ranks, tiny
from tests.test_checkpoint import build

LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"parallel__zero": 3}),
    (2, {"parallel__tp": 2}),
    (2, {"parallel__pp": 2}),
    (2, {"train__precision": Precision.bf16}),
    (2, {"parallel__pp": 2, "train__precision": Precision.bf16}),
]
FAULTS = [  # before which step, on which rank, what happens to the output of a layer, and what the guard says
    (0, -1, lambda out: out * float("nan"), "not a number"),
    (1, 0, lambda out: out.register_hook(lambda grad: grad * float("inf")) and None, "not a number"),
    (3, -1, lambda out: out * 1000, "loss spike"),
]


def small(**changes) -> Config:
    return tiny.config(model__layers=2, data__seq_len=32, **changes)


def bits(engine) -> list[torch.Tensor]:
    """Weights, masters and moments that this rank holds."""
    adamw = engine.deepspeed.optimizer.optimizer
    weights = [getattr(p, "ds_tensor", p) for p in engine.deepspeed.module.parameters()]
    moments = [x for state in adamw.state.values() for x in state.values()]
    return [x.detach().clone() for x in [*weights, *moments]]


def four_steps(cfg: Config, faults: list) -> tuple[list[tuple[float, float]], dict]:
    """Of the same rows, with the faulty ones between them, each of which must change nothing."""
    place, loader, engine = build(cfg)
    batches, out = loader.next_step(), []
    watch = guard.Guard(Guard(on_spike=OnSpike.skip, spike=5.0, window=2, share=1.0), steps=10)
    targets = host_sum([sum(int((b.labels >= 0).sum()) for b in batches)], place)[0]
    for i in range(4):
        for _, rank, fault, says in (f for f in faults if f[0] == i):
            before = bits(engine)
            last = [m for m in engine.deepspeed.module.modules() if isinstance(m, (Block, Head))][-1]  # of this stage
            hook = last.register_forward_hook(lambda module, args, out, fault=fault: fault(out))
            if place.rank != rank % place.world:
                hook.remove()
            engine.train_step(batches, targets, 1e-3, watch)
            hook.remove()
            assert watch.why == says
            assert all(torch.equal(a, b) for a, b in zip(before, bits(engine)))
        loss, norm = engine.train_step(batches, targets, 1e-3, watch)
        assert watch.why is None
        out.append((float(loss), float(norm)))
    return out, watch.state_dict()


@pytest.mark.parametrize(("world", "changes"), LAYOUTS, ids=str)
def test_a_fault_on_one_rank_leaves_no_trace_on_any(corpus, world, changes):
    cfg = small(data__path=corpus, **changes)
    clean = ranks.run(world, four_steps, cfg, [])
    for (expected, state), (seen, after) in zip(clean, ranks.run(world, four_steps, cfg, FAULTS)):
        assert seen == expected
        assert after == {**state, "skipped": 3, "spikes": 1}


def watched_step(cfg: Config) -> tuple[dict, float]:
    """The norms that are kept from a step that could be the last, and the whole norm they should make up."""
    place, loader, engine = build(cfg)
    batches = loader.next_step()
    targets = host_sum([sum(int((b.labels >= 0).sum()) for b in batches)], place)[0]
    _, norm = engine.train_step(batches, targets, 1e-3, guard.Guard(Guard(in_a_row=1), steps=10))
    return engine.norms, float(norm)


@pytest.mark.parametrize(("world", "changes"), LAYOUTS, ids=str)
def test_norms_by_parameter_make_up_the_gradient_norm(corpus, world, changes):
    single = ranks.run(1, watched_step, small(data__path=corpus))[0][0]
    for norms, norm in ranks.run(world, watched_step, small(data__path=corpus, **changes)):
        assert math.hypot(*(n["gradient"] for n in norms.values())) == pytest.approx(norm, rel=1e-4)
        assert set(norms) == set(single)
        for name, n in norms.items():
            assert n["weight"] == pytest.approx(single[name]["weight"], rel=1e-3), name


def test_only_a_full_window_knows_a_spike_and_it_stays_out_of_it():
    g = guard.Guard(Guard(on_spike=OnSpike.skip, window=4), steps=1000)
    assert [g.accepts(x, 1.0) for x in (9.0, 3.0, 2.9, 3.1)] == [True] * 4
    assert not g.accepts(30.0, 1.0)
    assert g.why == "loss spike"
    assert [g.accepts(x, 1.0) for x in (3.0, float("nan"), 3.0, 2.8)] == [True, False, True, True]
    assert list(g.losses) == [3.1, 3.0, 3.0, 2.8]
    assert (g.skipped, g.spikes) == (2, 1)
    keep = guard.Guard(Guard(window=2), steps=1000)
    assert all(keep.accepts(x, 1.0) for x in (3.0, 3.1, 30.0))
    assert (keep.skipped, keep.spikes) == (0, 1)


def test_one_bad_number_does_not_make_later_steps_bad():
    g = guard.Guard(Guard(on_spike=OnSpike.skip), steps=1000)
    losses = [5.0 - 0.01 * i + 0.1 * math.sin(i) for i in range(350)]
    for i, loss in enumerate(losses):
        for bad in ((float("nan"), 1.0), (1.0, float("inf"))) if i == 150 else ():
            assert not g.accepts(*bad)
        assert g.accepts(loss, 1.0), i


def test_budgets():
    g = guard.Guard(Guard(in_a_row=2, share=0.003), steps=1000)
    nan = float("nan")
    for _ in range(3):
        assert not g.last_chance
        g.accepts(nan, nan)
        assert not g.spent
        assert g.last_chance
        g.accepts(1.0, 1.0)
    assert g.last_chance
    g.accepts(nan, nan)
    assert g.spent
    row = guard.Guard(Guard(in_a_row=2), steps=1000)
    row.accepts(nan, 1.0)
    row.accepts(nan, 1.0)
    assert row.spent


def test_a_continued_guard_decides_as_an_unbroken_one():
    losses = [3.0 + 0.1 * math.sin(7 * i) + (2.0 if i % 11 == 0 else 0.0) for i in range(60)]
    for cut in (5, 20, 33):
        unbroken, first = (guard.Guard(Guard(on_spike=OnSpike.skip, window=8), steps=1000) for _ in range(2))
        expected = [unbroken.accepts(x, 1.0) for x in losses]
        seen = [first.accepts(x, 1.0) for x in losses[:cut]]
        second = guard.Guard(Guard(on_spike=OnSpike.skip, window=8), steps=1000)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + [second.accepts(x, 1.0) for x in losses[cut:]] == expected
        assert not all(expected)
