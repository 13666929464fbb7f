"""A run as one model: its logits are the run's, it has its tokenizer, and another run starts from it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from configs.errors import CheckpointError
from configs.schema import Config
from data import tokenizer
from launch import export
from parallel import checkpoint, mesh
from parallel.engine import MicroBatch
from tests import ranks, test_train, tiny
from tests.test_checkpoint import VOCAB, build, saver, steps
from train import describe


def validation(run, step: int) -> float:
    return test_train.lines(run, "val_loss")[step]["val_loss"]


@pytest.fixture(scope="module")
def exported(corpus, tmp_path_factory):
    """A run on two stages of two tensor-parallel ranks each, and what was made of its last checkpoint."""
    folder = tmp_path_factory.mktemp("exported")
    options = ["train.steps=3", "train.eval_batches=2", "parallel.tp=2", "parallel.pp=2"]
    test_train.train(corpus, folder / "run", *options, processes=4)
    assert export.main([str(folder / "run"), str(folder / "model")]) == 0
    return folder


def test_it_has_config_and_tokenizer(exported):
    content = json.loads((exported / "model" / "config.json").read_text())
    assert (content["step"], content["tokens"]) == (3, 3 * 4 * 128)
    assert content["model"]["layers"] == 2
    assert content["attention"]["l_slc"] == 16
    encoding = tokenizer.from_file(exported / "model" / content["tokenizer"]["ranks"])
    assert tokenizer.fingerprint(encoding) == content["tokenizer"]["fingerprint"]
    assert encoding._pat_str == content["tokenizer"]["pattern"]


def test_without_the_data_it_is_one_line_and_leaves_nothing(exported, tmp_path, monkeypatch, capsys):
    shutil.copytree(exported / "run", tmp_path / "run", symlinks=True)
    text = (tmp_path / "run/config.yaml").read_text()
    moved = OmegaConf.create(text)
    moved.data.path = "gone"
    (tmp_path / "run/config.yaml").write_text(OmegaConf.to_yaml(moved))
    monkeypatch.chdir(tmp_path)
    assert export.main(["run", "model"]) == 65
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_the_group_can_read_it(exported):
    assert {p.stat().st_mode & 0o777 for p in (exported / "model").iterdir()} == {0o640}


def logits_of_run(cfg: Config) -> tuple[MicroBatch, torch.Tensor]:
    """A batch and what a trained engine, now saved, says to it."""
    place, loader, engine = build(cfg)
    steps(2, place, loader, engine)
    batch = MicroBatch.of(loader.next_step()[0], place.device)
    with torch.no_grad():
        local = engine.deepspeed(batch.tokens, batch.documents)
    state = {**describe(cfg, place, VOCAB), "step": 2, "tokens": 0}
    keeper, _ = saver(cfg, place, engine)
    keeper.save(2, state)
    keeper.wait(last=True)
    whole = [torch.empty_like(local) for _ in range(place.tp.size)]
    if place.tp.size > 1:
        torch.distributed.all_gather(whole, local.contiguous(), group=place.tp.handle)
    return batch, torch.cat(whole, 1) if place.tp.size > 1 else local


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("nsa", {"parallel__tp": 2}), ("full", {"parallel__zero": 3, "model__tie_embeddings": True})],
    ids=str,
)
def test_its_logits_are_the_runs(corpus, tmp_path, kind, changes):
    run = tmp_path / "run"
    run.mkdir()
    cfg = tiny.config(kind, data__path=corpus, run__dir=str(run), model__layers=2, **changes)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg)))
    batch, expected = ranks.run(2, logits_of_run, cfg)[0]
    export.export(run, tmp_path / "model")
    with torch.no_grad():
        seen = export.load(tmp_path / "model")(batch.tokens, batch.documents)
    assert torch.allclose(seen, expected, rtol=1e-5, atol=1e-5)


def test_another_run_starts_from_it_on_another_layout(corpus, exported, tmp_path):
    run, start = tmp_path / "run", f"train.start_from={exported / 'model'}"
    test_train.train(corpus, run, "train.steps=1", "optim.lr=0", "optim.min_lr=0", "train.eval_batches=2", start)
    assert validation(run, 1) == pytest.approx(validation(exported / "run", 3), rel=1e-6)


def changed(exported: Path, folder: Path, **model) -> Path:
    """A copy of an export whose config.json has other options of the model; None takes one away."""
    shutil.copytree(exported / "model", folder)
    content = json.loads((folder / "config.json").read_text())
    both = {**content["model"], **model}
    content["model"] = {k: v for k, v in both.items() if v is not None or k not in model}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_one_from_before_there_were_tied_embeddings_is_not_tied(corpus, exported, tmp_path):
    old = changed(exported, tmp_path / "model", tie_embeddings=None)
    found, expected = (export.load(folder).state_dict() for folder in (old, exported / "model"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["0.tokens.weight"], found[f"{len(export.load(old)) - 1}.output.weight"])
    _, state = checkpoint.newest(exported / "run")
    ranks.run(2, lambda: checkpoint.check_model(old, mesh.build(1, 1), state))


OTHER = [
    ({"dim": None}, "model.dim"),
    ({"colour": 1}, "model.colour"),
    ({"tie_embeddings": True, "layers": 3}, "weights"),
]


@pytest.mark.parametrize(("options", "says"), OTHER, ids=str)
def test_options_of_another_version_are_one_line(exported, tmp_path, options, says):
    with pytest.raises(CheckpointError) as e:
        export.load(changed(exported, tmp_path / "model", **options))
    assert says in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("how", ["a flipped bit", "another model", "tied", "another version", "no model", "exists"])
def test_what_cannot_be_used_is_refused_in_one_line(corpus, exported, tmp_path, how, capsys):
    if how == "exists":
        assert export.main([str(exported / "run"), str(exported / "model")]) == 66
        assert "exists" in capsys.readouterr().err
        return
    folder = tmp_path / "model"
    if how != "no model":
        shutil.copytree(exported / "model", folder)
    if how == "a flipped bit":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
    if how == "another version":
        folder = changed(exported, tmp_path / "newer", colour=1)
    options = {"another model": ["model.mlp_dim=64"], "tied": ["model.tie_embeddings=true"]}.get(how, [])
    done = test_train.train(corpus, tmp_path / "run", f"train.start_from={folder}", *options, code=66)
    (line,) = test_train.errors(done)
    says = {"a flipped bit": "hash", "another model": "model.mlp_dim=96", "no model": "not readable"}
    says |= {"tied": "model.tie_embeddings=False, this run has True", "another version": "model.colour"}
    assert says[how] in line
    assert not (tmp_path / "run").exists()
