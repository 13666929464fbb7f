"""The command line as a user types it: every group composes, mistakes give one line and code 64."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.errors import ConfigError
from configs.schema import Kind
from launch.compose import compose, compose_all, from_text

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
NEEDED = ["data.path=corpus", "train.global_batch=16"]


def composed(monkeypatch, *overrides: str, world: int = 1):
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    return compose(world)


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml"))


@pytest.mark.parametrize(("model", "attention"), list(itertools.product(names("model"), names("attention"))))
def test_models_and_attentions(monkeypatch, model, attention):
    text = composed(monkeypatch, *NEEDED, f"model={model}", f"attention={attention}")
    cfg = from_text(text)
    assert cfg.model.name == model
    assert cfg.run.dir == f"runs/{model}-{attention}"
    assert (cfg.attention.kind is Kind.full) == (attention == "full")


@pytest.mark.parametrize("layout", names("parallel"))
def test_layouts(monkeypatch, layout):
    assert composed(monkeypatch, *NEEDED, f"parallel={layout}", world=8)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiments(monkeypatch, experiment):
    needed = NEEDED if experiment != "bench_1b" else []
    assert from_text(composed(monkeypatch, *needed, f"experiment={experiment}")).experiment == experiment


def test_the_yardstick_takes_overrides_of_its_groups(monkeypatch):
    full = from_text(composed(monkeypatch, "experiment=bench_1b"))
    assert (full.attention.kind, full.model.kv_heads, full.model.layers, full.data.random) == (Kind.full, 8, 16, 50304)
    assert full.train.global_batch * full.data.seq_len == 65536
    real = ["data=default", "data.path=tokens", "data.seq_len=8192"]
    nsa = from_text(composed(monkeypatch, "experiment=bench_1b", "attention=nsa", "model.kv_heads=2", *real))
    assert (nsa.attention.kind, nsa.model.kv_heads, nsa.data.random, nsa.data.path) == (Kind.nsa, 2, None, "tokens")


@pytest.mark.parametrize("key", ["_target_", "model._target_", "optim._target_", "wandb._target_", "data._target_"])
def test_nothing_that_a_configuration_names_is_called(monkeypatch, key, tmp_path):
    """Nor is it taken for an option."""
    for target, argument in (("os.system", f"touch {tmp_path}/x"), ("builtins.open", f"{tmp_path}/x")):
        with pytest.raises(ConfigError, match="_target_"):
            composed(monkeypatch, *NEEDED, f"+{key}={target}", f"+{key.replace('target', 'args')}=['{argument}', w]")
    assert not list(tmp_path.iterdir())


def test_the_papers_shape(monkeypatch):
    m = from_text(composed(monkeypatch, *NEEDED, "model=paper")).model
    assert (m.heads, m.kv_heads, m.qk_dim, m.v_dim) == (64, 4, 192, 128)


def test_text_and_back(monkeypatch):
    text = composed(monkeypatch, *NEEDED, "attention.branches=[cmp,win]", "optim.lr=1e-3", "attention.n=8")
    cfg = from_text(text)
    assert [b.value for b in cfg.attention.branches] == ["cmp", "win"]
    assert cfg.optim.lr == 1e-3
    assert cfg.attention.n == 8
    assert yaml.safe_load(text)["optim"]["lr"] == 1e-3


MISTAKES = [  # overrides, what the one line must say
    ([], ["data.path", "no value"]),
    (["model=huge"], ["model/huge", "160m"]),
    (["model.widht=3"], ["widht", "Model"]),
    (["trian.steps=3"], ["trian"]),
    (["train.steps=many"], ["train.steps", "many"]),
    (["attention.kind=dense"], ["attention.kind", "dense", "full", "nsa"]),
    (["attention.branches=[cmp,foo]"], ["attention.branches", "foo"]),
    (["train.steps"], ["train.steps"]),
    (["data.skip=x"], ["data.skip"]),
    (["profile.steps=3"], ["profile.steps", "int given for a list"]),
    (["data.path=x", "data.skip=[1,2]"], ["data.skip=[1, 2]", "[[first, last], ...]"]),
    (["data.path=x", "data.skip=[[1,2],3]"], ["data.skip=[[1, 2], 3]", "[[first, last], ...]"]),
    (["data.path=a=b"], ["="]),
    (["--steps", "3"], ["--steps"]),
    (["--multirun", "seed=0,1"], ["--multirun"]),
    (["experiment=null"], ["experiment=null", "ablate_n", "leave it out"]),
    (["model=160"], ["model=160", "160m"]),
    (["model=[160m,1b]"], ["model=[160m,1b]", "configs/model"]),
    (["=3"], ["=3", "KEY=VALUE"]),
    (["run.dir=runs/it's"], ["quote it for Hydra"]),
    (["hydra.run.dir=x"], ["hydra.run.dir", "run.dir=DIR"]),
    (["hydra/job_logging=default"], ["hydra/job_logging"]),
    (["optim.lr=inf", "data.path=x"], ["optim.lr=inf", "finite"]),
    (["data.path=x", "train.global_batch=15"], ["train.global_batch=15", "micro_batch"]),
]


@pytest.mark.parametrize(("overrides", "says"), MISTAKES, ids=str)
def test_a_mistake_is_one_line(monkeypatch, overrides, says):
    with pytest.raises(ConfigError) as e:
        composed(monkeypatch, *overrides)
    assert e.value.code == 64
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 400
    for part in says:
        assert part in str(e.value)


@pytest.mark.parametrize("override", ["attention=nsa,null", "seed=range(0)", "model=glob(no*)", "hydra.sweep.dir=x"])
def test_a_mistake_in_a_multirun_is_one_line(monkeypatch, override):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "data.path=x", override])
    with pytest.raises(ConfigError) as e:
        compose_all(1)
    assert "\n" not in str(e.value)


def test_broken_yaml_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [1, 2\nb: 3")
    with pytest.raises(ConfigError) as e:
        composed(monkeypatch, "--config-dir", str(tmp_path), "+bad@x=bad")
    assert "\n" not in str(e.value)


def test_cfg_job_prints_the_run_and_makes_no_folder(tmp_path):
    command = [sys.executable, str(CONFIGS.parent / "train.py"), "--cfg", "job", "model=160m", "data.path=corpus"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["model"]["dim"] == 768
    assert list(tmp_path.iterdir()) == []
