"""F34 secrets are written nowhere, F35 what a run writes is not for everybody, F16 nothing in a checkpoint is code."""

import ast
import os
import subprocess
from pathlib import Path

import pytest

from tests.test_train import ROOT, command, errors, train

SECRETS = {"WANDB_API_KEY": "7c0ffee" * 6, "HF_TOKEN": "hf_nobodymayread", "AWS_SECRET_ACCESS_KEY": "awsawsaws/secret"}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run that everybody could read by its umask, with secrets around it and an offline dashboard."""
    run = tmp_path_factory.mktemp("secret") / "run"
    shell = ["sh", "-c", 'umask 000; exec "$@"', "sh", *command(corpus, run, "train.steps=2", "wandb.mode=offline")]
    done = subprocess.run(shell, capture_output=True, timeout=120, env={**os.environ, **SECRETS}, check=True)
    (run / "said").write_bytes(done.stdout + done.stderr)
    return run


def test_no_file_of_a_run_has_a_secret(run):
    files = [p for p in run.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    for p in files:
        for value in SECRETS.values():
            assert value.encode() not in p.read_bytes(), p


def test_others_can_read_nothing_and_the_group_writes_nothing(run):
    for p in [run, *run.rglob("*")]:
        if p.name != "said" and not p.is_symlink():
            assert p.stat().st_mode & 0o027 == 0, f"{p} {p.stat().st_mode:o}"


def test_the_group_can_read_a_checkpoint(run):
    modes = {p.stat().st_mode & 0o777 for p in run.glob("checkpoints/**/*") if p.is_file() and not p.is_symlink()}
    assert modes == {0o640}


@pytest.mark.parametrize(
    "option",
    ["wandb.project=hf_nobodymayread", "wandb.project=${oc.env:HF_TOKEN}", "data.path=http://me:hunter22@host/x"],
)
def test_a_secret_in_the_configuration_is_refused_unsaid(corpus, tmp_path, option):
    done = train(corpus, tmp_path / "run", option, code=64, env=SECRETS)
    (line,) = errors(done)
    assert "holds" in line
    for value in (*SECRETS.values(), "hunter22"):
        assert value not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_nothing_of_a_checkpoint_or_model_is_unpickled():
    for path in [*(ROOT / "parallel").glob("*.py"), *(ROOT / "launch").glob("*.py"), ROOT / "train.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Import) and "pickle" in {a.name for a in node.names}), path
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load")), path
