"""What one layout saved, every other continues: weights and moments bit for bit, and the next step."""

from pathlib import Path

import pytest
import torch

from configs.schema import Config, Precision
from parallel import pieces
from tests import ranks, tiny
from tests.test_checkpoint import build, steps

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2 sequence": (2, {"parallel__tp": 2, "parallel__sequence": True}),
    "tp4": (4, {"parallel__tp": 4}),
    "pp2": (2, {"parallel__pp": 2}),
    "tp2 pp2": (4, {"parallel__tp": 2, "parallel__pp": 2}),
    "zero2": (2, {"parallel__zero": 2}),
    "zero3": (2, {"parallel__zero": 3}),
    "tp2 zero3": (4, {"parallel__tp": 2, "parallel__zero": 3}),
}


def save(cfg: Config, folder: Path) -> tuple[dict, list[tuple[float, float]]]:
    """Two steps, saved, and the one that followed."""
    place, loader, engine = build(cfg)
    steps(2, place, loader, engine)
    state = loader.state_dict()
    pieces.write(folder, engine.snapshot(), place.rank)
    return state, steps(1, place, loader, engine, 2)


def go_on(cfg: Config, folder: Path, state: dict, again: Path) -> list[tuple[float, float]]:
    """The step that follows in another layout, which first saves what it read."""
    place, loader, engine = build(cfg)
    engine.load(folder)
    pieces.write(again, engine.snapshot(), place.rank)
    loader.load_state_dict(state)
    return steps(1, place, loader, engine, 2)


def small(corpus: str, kind: str, **changes) -> Config:
    return tiny.config(kind, data__path=corpus, model__layers=2, **changes)


@pytest.fixture(scope="module", params=[("nsa", "tp2 pp2"), ("nsa", "zero3"), ("full", "dp2")], ids=" ".join)
def saved(request, corpus, tmp_path_factory):
    kind, layout = request.param
    folder = tmp_path_factory.mktemp("saved")
    world, changes = LAYOUTS[layout]
    state, after = ranks.run(world, save, small(corpus, kind, **changes), folder)[0]
    return kind, folder, state, after


def equal(a: Path, b: Path) -> bool:
    """Whether two layouts' files hold the same parameters and moments, bit for bit."""
    x, y = pieces.Reader(a), pieces.Reader(b)
    assert set(x.places) == set(y.places)
    assert x.updates == y.updates == 2
    return all(torch.equal(x.whole(n, kind), y.whole(n, kind)) for n in x.places for kind in pieces.KINDS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_continues(saved, corpus, tmp_path, layout):
    kind, folder, state, after = saved
    world, changes = LAYOUTS[layout]
    for out in ranks.run(world, go_on, small(corpus, kind, **changes), folder, state, tmp_path / "again"):
        assert out[0][0] == pytest.approx(after[0][0], rel=1e-6)
        assert out[0][1] == pytest.approx(after[0][1], rel=1e-5)
    assert equal(folder, tmp_path / "again")


@pytest.mark.parametrize(("source", "target"), [("tp2 pp2", "zero3"), ("zero3", "tp2 pp2"), ("dp2", "one")])
def test_bf16_continues_from_its_fp32_masters(corpus, tmp_path, source, target):
    (world, one), (other, two) = LAYOUTS[source], LAYOUTS[target]
    cfgs = [small(corpus, "nsa", train__precision=Precision.bf16, **changes) for changes in (one, two)]
    state, after = ranks.run(world, save, cfgs[0], tmp_path / "a")[0]
    out = ranks.run(other, go_on, cfgs[1], tmp_path / "a", state, tmp_path / "b")[0]
    assert out[0][0] == pytest.approx(after[0][0], rel=2e-3)
    assert equal(tmp_path / "a", tmp_path / "b")


def save_untrained(cfg: Config, folder: Path) -> bool:
    """Whether an engine that has made no update yet goes on from its own file as from nothing."""
    place, loader, engine = build(cfg)
    pieces.write(folder, engine.snapshot(), place.rank)
    expected = steps(2, place, loader, engine)
    place, loader, engine = build(cfg)
    engine.load(folder)
    return steps(2, place, loader, engine) == expected


@pytest.mark.parametrize("layout", ["one", "pp2", "zero3"])
def test_a_model_that_was_never_updated_can_be_saved(corpus, tmp_path, layout):
    world, changes = LAYOUTS[layout]
    assert all(ranks.run(world, save_untrained, small(corpus, "nsa", **changes), tmp_path / "new"))


def test_a_missing_piece_is_no_zeros(saved, tmp_path):
    _, folder, _, _ = saved
    files = sorted(folder.iterdir())
    for f in files[:-1]:
        (tmp_path / f.name).write_bytes(f.read_bytes())
    reader = pieces.Reader(tmp_path)
    lost = [p for p in pieces.Reader(folder).files[-1].keys() if p.startswith("weight/")]  # noqa: SIM118
    with pytest.raises((ValueError, KeyError)):
        reader.whole(lost[0].removeprefix("weight/"))
