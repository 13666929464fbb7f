"""The data path through train.py: mixtures, stages of another length, damage, and what a checkpoint keeps of it."""

import json
import shutil
from pathlib import Path

import pytest

from configs.schema import OnBadShard
from data.loader import Loader
from data.shards import read_manifest
from launch.clock import Clock
from launch.stop import Stop
from launch.waits import Waits
from parallel import mesh
from parallel.saver import Saver
from tests import ranks, tiny
from tests.test_train import errors, lines, train
from train import Run, next_batches, open_loader


def batches(made: Loader) -> list:
    return [(b.tokens.tolist(), b.labels.tolist()) for b in made.next_step()]


def data_state(run: Path, step: int) -> dict:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").read_text())["state"]["data"]


def damaged(corpus: str, tmp_path: Path, split: str) -> str:
    """A copy with a bit flipped in the middle of the first shard of a split."""
    data = Path(shutil.copytree(corpus, tmp_path / "damaged"))
    path = data / read_manifest(data).splits[split][0].path
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    return str(data)


@pytest.fixture(scope="module")
def pair(corpus, tmp_path_factory) -> Path:
    """Six steps of two data-parallel processes, saved after three."""
    run = tmp_path_factory.mktemp("pair") / "run"
    train(corpus, run, "train.steps=6", "checkpoint.every=3", processes=2)
    return run


def test_what_two_processes_saved_continues_on_any_number(corpus, pair):
    options = dict(split="train", seq_len=128, global_batch=4, micro_batch=1, seed=0)
    whole = Loader(corpus, **options)
    for _ in range(3):
        whole.next_step()
    assert data_state(pair, 3) == whole.state_dict()
    for size in (1, 2, 4):
        parts = [Loader(corpus, **options, dp_rank=r, dp_size=size) for r in range(size)]
        for r in parts:
            r.load_state_dict(data_state(pair, 3))
        alone = Loader(corpus, **options)
        alone.load_state_dict(data_state(pair, 3))
        for _ in range(3):
            assert [x for r in parts for x in batches(r)] == batches(alone)


def test_two_processes_continue_with_the_rows_that_they_had_not_read(corpus, pair, tmp_path):
    """As if they had been killed after their third step was saved: the same rows, losses and state from there."""
    run = Path(shutil.copytree(pair, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    done = train(corpus, run, "train.steps=6", "checkpoint.every=3", processes=2)
    assert "continues" in done.stdout
    logged = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    again = [m for m in logged if "loss" in m][-3:]
    expected = lines(pair)
    assert [m["step"] for m in again] == [4, 5, 6]
    for key in ("loss", "grad_norm", "tokens", "padding"):
        assert [m[key] for m in again] == pytest.approx([expected[m["step"]][key] for m in again], rel=1e-5)
    assert data_state(run, 6) == data_state(pair, 6)


@pytest.mark.parametrize(("layout", "processes"), [([], 1), (["parallel.tp=2"], 2)], ids=["one", "tp2"])
def test_what_two_processes_began_goes_on_elsewhere(corpus, pair, tmp_path, layout, processes):
    """As if they had been killed after their third step was saved, and another number of processes started again."""
    run = Path(shutil.copytree(pair, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    done = train(corpus, run, "train.steps=6", "checkpoint.every=3", *layout, processes=processes)
    assert "continues" in done.stdout
    again = [m for m in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in m][-3:]
    expected = lines(pair)
    assert [m["step"] for m in again] == [4, 5, 6]
    for key in ("loss", "grad_norm", "tokens", "padding"):
        assert [m[key] for m in again] == pytest.approx([expected[m["step"]][key] for m in again], rel=1e-5)
    assert data_state(run, 6) == data_state(pair, 6)


def test_a_mixture_on_two_processes_is_that_of_one(corpus, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "other")
    mix = f"data.mix={{{corpus}: 0.75, {other}: 0.25}}"
    one, two = tmp_path / "one", tmp_path / "two"
    for run, processes in ((one, 1), (two, 2)):
        train(corpus, run, "data.path=null", mix, "train.steps=3", processes=processes)
    assert data_state(two, 3)["weights"] == [3, 1]
    ours, theirs = ([m["loss"] for m in lines(r).values()] for r in (one, two))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_stage_of_longer_rows(corpus, tmp_path):
    run = tmp_path / "run"
    train(corpus, run, "train.steps=2")
    train(corpus, run, "train.steps=4", "data.seq_len=256")
    state = data_state(run, 4)
    assert (state["stages"], state["seq_len"], state["consumed_rows"]) == ([[128, 8]], 256, 8)
    assert [m["tokens"] for m in lines(run).values()] == [512, 1024, 2048, 3072]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_bit_ends_two_processes_with_one_line(corpus, tmp_path, split):
    data = damaged(corpus, tmp_path, split)
    done = train(data, tmp_path / "run", "train.steps=100", "train.eval_every=2", processes=2, code=65)
    (line,) = errors(done)
    assert f"{data}/{split}-000000.tar: sample 0 does not match its checksum" in line


@pytest.mark.slow
def test_rows_that_are_skipped_are_the_same_for_every_layout(corpus, tmp_path):
    data, losses = damaged(corpus, tmp_path, "train"), []
    for name, layout, processes in (("one", [], 1), ("dp", [], 2), ("tp", ["parallel.tp=2"], 2)):
        run = tmp_path / name
        done = train(data, run, "data.on_bad_shard=skip", "train.steps=6", *layout, processes=processes)
        last = lines(run)[6]
        assert last["rows_skipped"] == done.stdout.count("skips row") > 0
        assert last["padding"] >= 128 * last["rows_skipped"]
        assert "sample 0 does not match its checksum" in done.stdout
        losses.append([m["loss"] for m in lines(run).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def _batches_of_one_rank(corpus: str, damaged: str, tp: int) -> list:
    """What a rank trains on where rank 1 alone sees the damage."""
    place = mesh.build(tp, 1)
    cfg = tiny.config(data__path=corpus, data__seq_len=64, train__global_batch=8, train__micro_batch=2)
    cfg.parallel.tp = tp
    cfg.data.on_bad_shard = OnBadShard.skip
    loader = open_loader(cfg, place, "train", {damaged if place.rank == 1 else corpus: 1.0})
    saver = Saver(Path(damaged).parent / "run", None, place, cfg.checkpoint, print)
    run = Run(
        cfg,
        place,
        Stop(),
        loader.vocab_size,
        loader,
        None,
        None,
        None,
        None,
        Clock(),
        Waits(cfg, place.device),
        None,
        saver,
    )
    out = []
    for _ in range(6):
        made, totals = next_batches(run, loader)
        out.append((batches_of(made), totals.targets, totals.padding, loader.skipped))
    return [place.dp.rank, out]


def batches_of(made: list) -> list:
    return [(b.tokens.tolist(), b.labels.tolist(), b.cu_seqlens.tolist()) for b in made]


def test_damage_that_one_node_sees_empties_the_rows_of_all_that_hold_them(corpus, tmp_path):
    data = damaged(corpus, tmp_path, "train")
    (_, first), (_, second) = ranks.run(2, _batches_of_one_rank, corpus, data, 2)
    assert first == second, "the ranks of a tensor-parallel group train on the same rows"
    assert first[-1][3] > 0
    apart = ranks.run(2, _batches_of_one_rank, corpus, data, 1)
    for step in range(6):
        (_, *counts), (_, *others) = (r[1][step] for r in apart)
        assert counts == others, "all ranks count the same"
        assert len(apart[0][1][step][0]) == len(apart[1][1][step][0]) == 2


WRONG = [  # overrides, what the line says
    (["data.mix={a: 0.5}"], ["data.path", "data.mix"]),
    (["data.path=null"], ["data.path", "no value"]),
    (["data.path=null", "data.mix={a: 0, b: 1}"], ["data.mix.a"]),
    (["data.path=null", "data.mix=3"], ["data.mix=3"]),
    (["data.path=null", "data.mix={a: x}"], ["data.mix"]),
    (["data.path='pipe:cat x'"], ["pipe: is not allowed"]),
    (["data.path=ftp://h/x"], ["ftp: is not allowed"]),
    (["data.on_bad_shard=ignore"], ["on_bad_shard"]),
    (["data.timeout=0"], ["data.timeout=0"]),
]


@pytest.mark.parametrize(("overrides", "says"), WRONG, ids=str)
def test_options_that_do_not_go_together(corpus, tmp_path, overrides, says):
    (line,) = errors(train(corpus, tmp_path / "run", *overrides, code=64))
    for part in says:
        assert part in line
