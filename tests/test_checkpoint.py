"""Checkpoints: continued runs equal unbroken ones, damage is found before anything is loaded, nothing is half-made."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.errors import CheckpointError
from configs.schema import Config, Resume
from data.loader import Loader
from data.shards import sha256
from parallel import checkpoint, mesh
from parallel.comm import host_sum
from parallel.engine import Engine, convert
from tests import ranks, tiny

VOCAB = 512


def build(cfg: Config) -> tuple[mesh.Mesh, Loader, Engine]:
    place = mesh.build(cfg.parallel.tp, cfg.parallel.pp)
    t = cfg.train
    loader = Loader(
        cfg.data.path, "train", cfg.data.seq_len, t.global_batch, t.micro_batch, cfg.seed, place.dp.rank, place.dp.size
    )
    return place, loader, Engine(cfg, VOCAB, place)


def steps(count: int, place: mesh.Mesh, loader: Loader, engine: Engine, first: int = 0) -> list[tuple[float, float]]:
    out = []
    for i in range(first, first + count):
        batches = loader.next_step()
        targets = host_sum([sum(int((b.labels >= 0).sum()) for b in batches)], place)[0] // (
            place.tp.size * place.pp.size
        )
        loss, norm = engine.train_step(batches, targets, 1e-3 / (i + 1))
        out.append((float(loss), float(norm)))
    return out


def state(cfg: Config, **more) -> dict:
    p = cfg.parallel
    layout = {"parallel.tp": p.tp, "parallel.pp": p.pp, "parallel.zero": p.zero, "ranks": dist.get_world_size()}
    return {"identity": {"model.dim": cfg.model.dim}, "layout": layout, **more}


def train_and_save(cfg: Config, saves: tuple[int, ...], keep: int, total: int) -> list[tuple[float, float]]:
    place, loader, engine = build(cfg)
    out = []
    for i in range(total):
        if i in saves:
            checkpoint.save(Path(cfg.run.dir), i, engine, place, state(cfg, step=i, data=loader.state_dict()), keep)
        out += steps(1, place, loader, engine, i)
    return out


def resume(cfg: Config, count: int, how: Resume = Resume.auto) -> tuple[int, list[tuple[float, float]]]:
    place, loader, engine = build(cfg)
    found = checkpoint.find(Path(cfg.run.dir), place, how, state(cfg))
    assert found is not None
    checkpoint.load(found, engine, place, state(cfg))
    loader.load_state_dict(found[1]["data"])
    return found[1]["step"], steps(count, place, loader, engine, found[1]["step"])


def look(cfg: Config, how: Resume) -> str:
    """What `find` says, without an engine."""
    try:
        found = checkpoint.find(Path(cfg.run.dir), mesh.build(cfg.parallel.tp, cfg.parallel.pp), how, state(cfg))
    except CheckpointError as e:
        return f"{e.code} {e}"
    return found[0] if found else "new"


@pytest.fixture
def cfg(corpus, tmp_path) -> Config:
    return tiny.config(data__path=corpus, run__dir=str(tmp_path / "run"), model__layers=2, train__global_batch=4)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (1, {}),
        (2, {"parallel__zero": 3}),
        (2, {"parallel__tp": 2, "parallel__sequence": True}),
        (2, {"parallel__pp": 2}),
    ],
    ids=str,
)
def test_a_continued_run_is_the_unbroken_one_bit_for_bit(cfg, world, changes):
    cfg = tiny.change(cfg, **changes)
    unbroken = ranks.run(world, train_and_save, cfg, (2,), 2, 4)
    for rank, (step, continued) in enumerate(ranks.run(world, resume, cfg, 2)):
        assert step == 2
        assert continued == unbroken[rank][2:]


@pytest.fixture
def saved(cfg) -> Config:
    ranks.run(1, train_and_save, cfg, (1, 2), 2, 3)
    return cfg


def folders(cfg: Config) -> list[Path]:
    return sorted(Path(cfg.run.dir, "checkpoints").iterdir())


def test_manifest_lists_every_file(saved):
    for folder in folders(saved):
        listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"MANIFEST.json"}
        assert set(listed) == there
        assert all(sha256(folder / name) == entry["sha256"] for name, entry in listed.items())


def test_only_the_newest_are_kept(cfg):
    ranks.run(1, train_and_save, cfg, (0, 1, 2), 2, 3)
    assert [p.name for p in folders(cfg)] == ["step-00000001", "step-00000002"]


def damage(folder: Path, how: str) -> None:
    largest = max(folder.rglob("*.pt"), key=lambda p: p.stat().st_size)
    if how == "a flipped bit":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif how == "a short file":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif how == "a missing file":
        largest.unlink()
    elif how == "half a manifest":
        manifest = folder / "MANIFEST.json"
        manifest.write_text(manifest.read_text()[:40])
    else:
        (folder / "MANIFEST.json").unlink()


@pytest.mark.parametrize("how", ["a flipped bit", "a short file", "a missing file", "half a manifest", "no manifest"])
def test_damage_goes_back_to_the_one_before(saved, how):
    old, new = folders(saved)
    damage(new, how)
    assert ranks.run(2, look, saved, Resume.auto) == [str(old)] * 2
    assert ranks.run(1, resume, saved, 1)[0][0] == 1
    damage(old, how)
    assert "every checkpoint is damaged" in ranks.run(1, look, saved, Resume.auto)[0]
    assert "resume=must" in ranks.run(1, look, saved, Resume.must)[0]


def test_resume_must_and_never(cfg):
    assert ranks.run(1, look, cfg, Resume.auto) == ["new"]
    assert ranks.run(1, look, cfg, Resume.never) == ["new"]
    assert "resume=must" in ranks.run(1, look, cfg, Resume.must)[0]
    ranks.run(1, train_and_save, cfg, (1,), 2, 2)
    says = ranks.run(1, look, cfg, Resume.never)[0]
    assert says.startswith("66 error: run.dir")
    assert "exists and resume=never" in says
    assert ranks.run(1, look, cfg, Resume.must) == [str(folders(cfg)[0])]


def test_another_model_is_refused(saved):
    says = ranks.run(1, look, tiny.change(saved, model__dim=128), Resume.auto)[0]
    assert "other settings" in says
    assert "model.dim=64, this run has 128" in says


def test_zero_3_is_refused_on_another_layout(saved):
    says = ranks.run(2, look, tiny.change(saved, parallel__zero=3), Resume.auto)[1]
    assert "ZeRO 3 continues on its own layout only: parallel.zero=1, this run has 3" in says


def contents(cfg: Config, step: int, folder: Path) -> dict[str, torch.Tensor]:
    """The master weights and moments of each parameter that a checkpoint holds, whatever its layout."""
    convert(Path(cfg.run.dir, "checkpoints", f"step-{step:08d}", checkpoint.SHARDS), folder / checkpoint.SHARDS)
    found = sorted((folder / checkpoint.SHARDS / "zero").glob("*/*.pt"))
    return {str(p.relative_to(folder)): torch.load(p, weights_only=False) for p in found}


def save_at_once(cfg: Config) -> list[tuple[float, float]]:
    """Continue, and save what was loaded as another step before the next two."""
    place, loader, engine = build(cfg)
    found = checkpoint.find(Path(cfg.run.dir), place, Resume.must, state(cfg))
    checkpoint.load(found, engine, place, state(cfg))
    checkpoint.save(Path(cfg.run.dir), 3, engine, place, state(cfg), 9)
    loader.load_state_dict(found[1]["data"])
    return steps(2, place, loader, engine, 2)


@pytest.fixture(scope="module")
def four(corpus, tmp_path_factory):
    """Saved after two steps of four processes, and what two more steps gave."""
    cfg = tiny.config(data__path=corpus, run__dir=str(tmp_path_factory.mktemp("four")), model__layers=2)
    out = ranks.run(4, train_and_save, tiny.change(cfg, parallel__tp=2), (2,), 9, 4)
    return cfg, out[0][2:]


@pytest.mark.parametrize(
    ("world", "layout"), [(1, {}), (2, {"zero": 2}), (2, {"pp": 2}), (4, {"tp": 4, "sequence": True})], ids=str
)
def test_another_layout_continues_with_the_same_state(four, tmp_path, world, layout):
    cfg, after = four
    run = shutil.copytree(cfg.run.dir, tmp_path / "run")
    cfg = tiny.change(cfg, run__dir=str(run), **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(world, save_at_once, cfg):
        for ours, theirs in zip(out, after, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    assert [p.name for p in folders(cfg)] == ["step-00000002", "step-00000003"], "the converted copy is gone"
    ours, theirs = contents(cfg, 3, tmp_path / "ours"), contents(cfg, 2, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("exp_avg_sq.pt") for name in ours)
    for name, there in theirs.items():
        assert same(ours[name], there), name


def same(ours: Any, theirs: Any) -> bool:
    """Bit for bit, in dictionaries as well."""
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    return torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs


def test_a_conversion_that_fails_is_one_line(four, tmp_path):
    cfg = tiny.change(four[0], run__dir=str(shutil.copytree(four[0].run.dir, tmp_path / "run")))
    says = ranks.run(1, fail_to_convert, cfg)[0]
    assert says.startswith("66 error: checkpoint")
    assert "conversion failed" in says


def fail_to_convert(cfg: Config) -> str:
    """The shards go between verification and conversion."""
    place, _, engine = build(cfg)
    found = checkpoint.find(Path(cfg.run.dir), place, Resume.must, state(cfg))
    shutil.rmtree(Path(found[0], checkpoint.SHARDS))
    try:
        checkpoint.load(found, engine, place, state(cfg))
    except CheckpointError as e:
        return f"{e.code} {e}"
    return "loaded"


def save_with_a_full_disk(cfg: Config) -> tuple[str, list[str], str]:
    """Rank 1 fails to write; then the disk has room again."""
    place, loader, engine = build(cfg)
    steps(1, place, loader, engine)
    works = engine.save

    def full(*args):
        works(*args)
        if place.rank == 1:
            raise OSError(28, "No space left on device")

    engine.save = full
    said = ""
    try:
        checkpoint.save(Path(cfg.run.dir), 1, engine, place, state(cfg), 2)
    except CheckpointError as e:
        said = str(e)
    published = checkpoint.published(Path(cfg.run.dir))
    engine.save = works
    return said, published, str(checkpoint.save(Path(cfg.run.dir), 1, engine, place, state(cfg), 2))


def test_one_rank_that_cannot_write_publishes_nothing(cfg):
    for said, published, path in ranks.run(2, save_with_a_full_disk, cfg):
        assert "rank 1" in said
        assert "No space left" in said
        assert published == []
        assert path.endswith("step-00000001")
    assert [p.name for p in folders(cfg)] == ["step-00000001"]


def test_what_an_interrupted_save_left_is_no_checkpoint(saved):
    newest = folders(saved)[-1]
    shutil.copytree(newest, newest.with_name("step-00000009.tmp"))
    assert ranks.run(1, look, saved, Resume.auto) == [str(newest)]
