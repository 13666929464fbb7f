"""Batches that are passed over, and which batch a step was trained on."""

import json
from pathlib import Path

import pytest

from configs.schema import LongDocuments
from data import batches, inspect, tokenizer
from data.loader import Loader
from data.shards import read_manifest
from tests.test_train import lines, train

SKIP = [[3, 4], [6, 6], [2, 3]]  # in any order, and overlapping
LEFT = [1, 5, 7, 8, 9, 10, 11, 12]


def loader(corpus: str, rank: int = 0, size: int = 1, **more) -> Loader:
    return Loader(corpus, "train", 64, 8, 2, 7, rank, size, **more)


def rows(*made: Loader) -> list:
    return [row for x in made for b in x.next_step() for row in zip(b.tokens.tolist(), b.labels.tolist())]


@pytest.mark.parametrize("read_ahead", [0, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_the_batches_between_are_the_same_and_in_order(corpus, size, read_ahead):
    plain = loader(corpus)
    every = [rows(plain) for _ in range(12)]
    ranks = [loader(corpus, r, size, skip=SKIP, read_ahead=read_ahead) for r in range(size)]
    for step, number in enumerate(LEFT):
        assert [r.coming[0] for r in ranks] == [number] * size
        assert rows(*ranks) == every[number - 1]
        assert ranks[0].batch == number
        saved = ranks[0].state_dict()
        if step % 3 == 1:  # goes on in new processes
            ranks = [loader(corpus, r, size, skip=SKIP, read_ahead=read_ahead) for r in range(size)]
            for r in ranks:
                r.load_state_dict(json.loads(json.dumps(saved)))


def test_batches_are_counted_on_through_a_stage_of_longer_rows(corpus):
    short = loader(corpus)
    short.next_step(), short.next_step()
    plain, skips = (Loader(corpus, "train", 128, 8, 2, 7, skip=skip) for skip in ([], [[1, 2], [4, 5]]))
    for x in (plain, skips):
        x.load_state_dict(short.state_dict())
    every = [rows(plain) for _ in range(4)]
    assert [rows(skips), rows(skips)] == [every[0], every[3]]
    assert skips.batch == 6


def encoding(corpus: str):
    known = read_manifest(corpus).tokenizer
    return tokenizer.load(known["name"], f"{corpus}/{known['ranks']}")


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Four steps that pass over two batches, then one more batch is ruled out and the last steps are done again."""
    run = tmp_path_factory.mktemp("skips") / "run"
    train(corpus, run, "train.steps=4", "checkpoint.every=2", "data.skip=[[2,3]]", "train.log_every=2")
    for folder in (run / "checkpoints").glob("step-00000004"):
        folder.rename(run / "checkpoints" / "gone")
    done = train(corpus, run, "train.steps=4", "data.skip=[[2,3],[5,5]]")
    assert "step 3 passes over batches 5 to 5" in done.stdout
    return run


def test_a_run_says_which_batch_a_step_took(run):
    assert {step: m["batch"] for step, m in lines(run).items()} == {2: 4, 3: 6, 4: 7}


@pytest.mark.parametrize(("step", "number"), [(1, 1), (2, 4), (3, 6), (4, 7)])
def test_what_a_step_was_trained_on_is_shown(run, corpus, capsys, step, number):
    plain = Loader(corpus, "train", 128, 4, 2, 0)
    for _ in range(number):
        expected = [row for b in plain.next_step() for row in b.tokens.tolist()]
    found, batch, first = batches.find(run, step)
    assert (batch, first) == (number, (number - 1) * 4)
    for row, tokens in enumerate(expected):
        assert [i for p in batches.parts(found, first + row) for i in p.ids] == tokens
    assert inspect.main([str(run), "--batch", str(step)]) == 0
    said = capsys.readouterr().out
    assert f"step {step} took batch {number}, rows {first} to {first + 3}" in said
    assert " ".join(map(str, expected[0][:8])) in said
    assert said.count("128 tokens of") == 4
    assert json.dumps(encoding(corpus).decode(expected[0][:5]), ensure_ascii=False)[:-1] in said


def test_documents_that_are_cut_are_shown_too(corpus, tmp_path):
    made = loader(corpus, long_documents=LongDocuments.cut, skip=[[1, 9]])
    batches.append(tmp_path, 0, made)
    found, number, first = batches.find(tmp_path, 2)
    made.next_step()
    shown = [[i for p in batches.parts(found, first + k) for i in p.ids] for k in range(8)]
    assert number == 11
    assert [tokens[: len(s)] for s, (tokens, _) in zip(shown, rows(made))] == shown


def test_no_such_step_or_run(run, tmp_path, capsys):
    assert inspect.main([str(tmp_path), "--batch", "1"]) == 65
    assert "no readable batches.jsonl" in capsys.readouterr().err
    assert inspect.main([str(run), "--batch", "0"]) == 64
