"""Checkpoints: continued runs equal unbroken ones, damage is found before anything is loaded, nothing is half-made."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from configs.errors import CheckpointError
from configs.schema import Config, Resume
from data.loader import Loader
from data.shards import sha256
from parallel import checkpoint, mesh, pieces
from parallel.comm import host_sum
from parallel.engine import Engine
from parallel.saver import Saver
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
    layout = {"tp": cfg.parallel.tp, "pp": cfg.parallel.pp}
    return {"identity": {"model.dim": cfg.model.dim}, "layout": layout, "tokens": 0, **more}


def saver(cfg: Config, place: mesh.Mesh, engine: Engine) -> tuple[Saver, list[dict]]:
    """With what it reports."""
    reports: list[dict] = []
    return Saver(Path(cfg.run.dir), engine, place, cfg.checkpoint, reports.append), reports


def train_and_save(cfg: Config, saves: tuple[int, ...], total: int) -> list[tuple[float, float]]:
    place, loader, engine = build(cfg)
    keeper, _ = saver(cfg, place, engine)
    out = []
    for i in range(total):
        if i in saves:
            keeper.save(i, state(cfg, step=i, data=loader.state_dict()))
        out += steps(1, place, loader, engine, i)
    keeper.wait(last=True)
    return out


def resume(cfg: Config, count: int, how: Resume = Resume.auto) -> tuple[int, list[tuple[float, float]]]:
    place, loader, engine = build(cfg)
    found = checkpoint.find(Path(cfg.run.dir), place, how, state(cfg))
    assert found is not None
    checkpoint.load(found[0], engine)
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
    return tiny.config(data__path=corpus, run__dir=str(tmp_path / "run"), model__layers=2, checkpoint__every=1)


LAYOUTS = [
    (1, {}),
    (2, {"parallel__zero": 3}),
    (2, {"parallel__tp": 2, "parallel__sequence": True}),
    (2, {"parallel__pp": 2}),
]


@pytest.mark.parametrize(("world", "changes"), LAYOUTS, ids=str)
def test_a_continued_run_is_the_unbroken_one_bit_for_bit(cfg, world, changes):
    cfg = tiny.change(cfg, **changes)
    unbroken = ranks.run(world, train_and_save, cfg, (2,), 4)
    for rank, (step, continued) in enumerate(ranks.run(world, resume, cfg, 2)):
        assert step == 2
        assert continued == unbroken[rank][2:]


def save_both_ways(cfg: Config, behind: int) -> list[tuple[dict, dict]]:
    """One state, saved while training waits and behind further steps: the manifest's files, and what is reported."""
    place, loader, engine = build(cfg)
    steps(1, place, loader, engine)
    out = []
    for asynchronous in (False, True):
        this = tiny.change(cfg, run__dir=f"{cfg.run.dir}-{asynchronous}", checkpoint__asynchronous=asynchronous)
        keeper, reports = saver(this, place, engine)
        keeper.save(1, state(cfg, step=1))
        steps(behind if asynchronous else 0, place, loader, engine, 1)
        keeper.wait(last=True)
        manifest = Path(this.run.dir, "checkpoints/step-00000001/MANIFEST.json")
        out.append((json.loads(manifest.read_text())["files"], reports[0]))
    return out


@pytest.mark.parametrize(("world", "changes"), LAYOUTS, ids=str)
def test_a_save_behind_training_is_the_one_that_training_waits_for(cfg, world, changes, monkeypatch):
    write = pieces.write
    monkeypatch.setattr(pieces, "write", lambda *args: (time.sleep(0.5), write(*args))[1])  # the ranks inherit it
    for (waited, a), (behind, b) in ranks.run(world, save_both_ways, tiny.change(cfg, **changes), 3):
        assert waited == behind
        assert a["save_stall_s"] > 0.5
        assert b["save_background_s"] > 0.5
        assert b["save_gib"] == a["save_gib"] > 0


@pytest.fixture
def saved(cfg) -> Config:
    ranks.run(1, train_and_save, cfg, (1, 2), 3)
    return cfg


def folders(cfg: Config) -> list[Path]:
    return sorted(Path(cfg.run.dir, "checkpoints").iterdir())


def test_manifest_lists_every_file(saved):
    for folder in folders(saved):
        listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {"MANIFEST.json"}
        assert set(listed) == there
        assert all(sha256(folder / name) == entry["sha256"] for name, entry in listed.items())


def save_and_watch(cfg: Config) -> list[tuple[str, str]]:
    """What a save has the disk do, in order: (sync or rename, path below the run)."""
    place, _, engine = build(cfg)
    keeper, _ = saver(cfg, place, engine)
    fsync, rename, seen = os.fsync, os.rename, []

    def below(path: str) -> str:
        return os.path.relpath(os.path.realpath(path), os.path.realpath(cfg.run.dir))

    def watched_fsync(handle: int) -> None:
        fsync(handle)
        seen.append(("sync", below(f"/proc/self/fd/{handle}")))

    def watched_rename(old, new) -> None:
        rename(old, new)
        seen.append(("rename", below(new)))

    os.fsync, os.rename = watched_fsync, watched_rename
    keeper.save(1, state(cfg, step=1))
    keeper.wait(last=True)
    os.fsync, os.rename = fsync, rename
    return seen


def test_all_is_on_the_disk_before_it_counts(cfg):
    """A machine that loses its power after the rename has every file, and the rename itself once it is synced."""
    seen = ranks.run(1, save_and_watch, cfg)[0]
    folder = "checkpoints/step-00000001"
    before, after = seen[: seen.index(("rename", folder))], seen[seen.index(("rename", folder)) :]
    files = ["pieces/rank-00000.safetensors", "MANIFEST.json", "pieces", ""]
    assert [path for _, path in before] == [f"{folder}.tmp/{f}".rstrip("/") for f in files]
    assert after[1:] == [("sync", "checkpoints")]


def test_only_the_newest_are_kept(cfg):
    ranks.run(1, train_and_save, cfg, (0, 1, 2), 3)
    assert [p.name for p in folders(cfg)] == ["step-00000001", "step-00000002"]


def damage(folder: Path, how: str) -> None:
    largest = max(folder.rglob("*.safetensors"), key=lambda p: p.stat().st_size)
    if how == "a flipped bit":
        data = bytearray(largest.read_bytes())
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    elif how == "a short file":
        largest.write_bytes(largest.read_bytes()[:-1])
    elif how == "a missing file":
        largest.unlink()
    elif how == "an empty file":
        largest.write_bytes(b"")
    elif how == "a file too many":
        shutil.copy(largest, largest.with_name("rank-00007.safetensors"))
    elif how == "swapped files":
        other = min(folder.rglob("*.safetensors"), key=lambda p: p.stat().st_size)
        a, b = largest.read_bytes(), other.read_bytes()
        largest.write_bytes(b), other.write_bytes(a)
    elif how == "half a manifest":
        manifest = folder / "MANIFEST.json"
        manifest.write_text(manifest.read_text()[:40])
    else:
        (folder / "MANIFEST.json").unlink()


DAMAGE = "a flipped bit, a short file, an empty file, a missing file, a file too many, half a manifest, no manifest"


@pytest.mark.parametrize("how", DAMAGE.split(", "))
def test_damage_goes_back_to_the_one_before(saved, how):
    old, new = folders(saved)
    damage(new, how)
    assert ranks.run(2, look, saved, Resume.auto) == [str(old)] * 2
    assert ranks.run(1, resume, saved, 1)[0][0] == 1
    damage(old, how)
    assert "every checkpoint is damaged" in ranks.run(1, look, saved, Resume.auto)[0]
    assert "resume=must" in ranks.run(1, look, saved, Resume.must)[0]


def test_files_of_two_ranks_that_are_swapped(cfg):
    cfg = tiny.change(cfg, parallel__pp=2)
    ranks.run(2, train_and_save, cfg, (1, 2), 3)
    old, new = folders(cfg)
    damage(new, "swapped files")
    assert ranks.run(2, look, cfg, Resume.auto) == [str(old)] * 2


def test_a_flipped_bit_in_a_manifest_is_never_believed(saved):
    """Any bit: what is no JSON any more, what names another file, and what is only another number."""
    manifest = folders(saved)[-1] / "MANIFEST.json"
    raw, content = manifest.read_bytes(), json.loads(manifest.read_text())
    for place in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        manifest.write_bytes(changed)
        try:
            same = json.loads(manifest.read_bytes()) == content
        except ValueError:
            same = False
        assert same or checkpoint._damage(str(manifest.parent)), raw[place - 20 : place + 20]


def test_a_damaged_step_is_saved_again_beside_itself(saved):
    """What a run does that went back and comes to the damaged step again."""
    old, new = folders(saved)
    damage(new, "a flipped bit")
    spoilt = checkpoint.sha256(next(new.rglob("*.safetensors")))
    assert ranks.run(1, look, saved, Resume.auto) == [str(old)]
    ranks.run(1, train_and_save, saved, (1, 2), 3)
    names = [p.name for p in folders(saved)]
    assert names == ["damaged-1-step-00000002", "step-00000001", "step-00000002"]
    assert checkpoint._damage(str(new)) is None
    assert checkpoint.sha256(next((new.parent / names[0]).rglob("*.safetensors"))) == spoilt


def test_what_is_kept_goes_by_the_step_not_by_the_clock(cfg):
    ranks.run(1, train_and_save, cfg, (1, 2), 3)
    for i, folder in enumerate(folders(cfg)):
        os.utime(folder, (2e9 - i, 2e9 - i))
    ranks.run(1, train_and_save, tiny.change(cfg, seed=1), (3,), 4)
    assert [p.name for p in folders(cfg)] == ["step-00000002", "step-00000003"]
    assert ranks.run(1, look, cfg, Resume.auto) == [str(folders(cfg)[-1])]


def test_another_format_is_refused_and_not_passed_over(saved):
    manifest = folders(saved)[-1] / "MANIFEST.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    says = ranks.run(2, look, saved, Resume.auto)[1]
    assert says.startswith("66 error: checkpoint")
    assert f"has format 99, this version reads {checkpoint.VERSION}" in says


def test_resume_must_and_never(cfg):
    assert ranks.run(1, look, cfg, Resume.auto) == ["new"]
    assert ranks.run(1, look, cfg, Resume.never) == ["new"]
    assert "resume=must" in ranks.run(1, look, cfg, Resume.must)[0]
    ranks.run(1, train_and_save, cfg, (1,), 2)
    says = ranks.run(1, look, cfg, Resume.never)[0]
    assert says.startswith("66 error: run.dir")
    assert "exists and resume=never" in says
    assert ranks.run(1, look, cfg, Resume.must) == [str(folders(cfg)[0])]


def test_another_model_is_refused_and_another_layout_is_not(saved):
    says = ranks.run(1, look, tiny.change(saved, model__dim=128), Resume.auto)[0]
    assert "another model" in says
    assert "model.dim=64, this run has 128" in says
    assert "give model.dim=64" in says
    assert ranks.run(2, look, tiny.change(saved, parallel__tp=2), Resume.auto) == [str(folders(saved)[-1])] * 2


def test_what_an_interrupted_save_left_is_no_checkpoint(saved):
    newest = folders(saved)[-1]
    shutil.copytree(newest, newest.with_name("step-00000009.tmp"))
    assert ranks.run(1, look, saved, Resume.auto) == [str(newest)]
