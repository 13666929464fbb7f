"""The commands of README.md and docs/, as a reader would copy them; the long ones by `pytest -m slow`."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch import supervise
from launch.compose import compose, compose_all
from launch.submit import DEFAULTS, processes
from launch.sweep import plan

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "LOG.md")]
PROGRAMS = ("python ", "make ", "launch/", "sbatch ")
SUPERVISE = "python -m launch.supervise"
LONG = ("make train", "make ablations", "python -m data.bench")
GPU = ("python -m nsa.bench",)


def commands(page: Path) -> list[str]:
    """Lines of a page's code blocks that are commands; a block marked sh holds nothing else."""
    out = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        lines = block.splitlines()
        assert kind != "sh" or all(line.startswith(PROGRAMS) for line in lines), block
        out += [line for line in lines if line.startswith(PROGRAMS)]
    return out


ALL = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def a_run(command: str) -> list[str]:
    """The command line of train.py in a command, behind options of slurm; empty if it has none."""
    if "launch/doctor.py" in command:
        return []
    for start in ("python train.py", "launch/local.sh", "python -m launch.submit", SUPERVISE, "sbatch"):
        if command.startswith(start):
            return [w for w in words(command)[len(start.split()) :] if w != "launch/slurm.sbatch"]
    return []


def test_there_are_commands_on_every_page_and_none_of_a_kind_that_no_test_knows():
    assert all(commands(page) for page in PAGES)
    known = [*RUNS, *MODULES, *MAKE, *DOCTORS]
    assert sorted(known) == sorted(ALL)


RUNS = [c for c in ALL if a_run(c)]
MODULES = [c for c in ALL if c.startswith("python -m ") and not a_run(c)]
MAKE = [c for c in ALL if c.startswith("make ")]
DOCTORS = [c for c in ALL if c.startswith("sbatch ") and not a_run(c)]


@pytest.mark.parametrize("command", RUNS)
def test_each_run_is_one_that_the_rules_allow(command, monkeypatch, capsys):
    arguments = a_run(command)
    if command.startswith(SUPERVISE):
        options, arguments = supervise._parse(arguments)
        world = options.n * options.nodes
    elif arguments[0] == "-n":
        world, arguments = int(arguments[1]), arguments[2:]
    else:
        options = [a for a in arguments if a.startswith("--") and a != "--cfg"]
        arguments = [a for a in arguments if a not in options]
        world = 1 if command.startswith("python train.py") else processes(options)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    if "-m" in arguments:
        assert len(plan(compose_all(world))) > 1
    elif "--cfg" in arguments or "--help" in arguments:
        assert compose(world) is None
        assert "attention" in capsys.readouterr().out
    else:
        assert compose(world)


def test_eight_gpus_are_what_the_script_asks_for():
    asked = re.findall(r"^#SBATCH (--\S+)=(\S+)", (ROOT / "launch/slurm.sbatch").read_text(), re.MULTILINE)
    assert dict(asked).items() >= DEFAULTS.items()


@pytest.mark.parametrize("command", [*MODULES, *DOCTORS])
def test_each_module_has_the_options_that_it_is_given(command, monkeypatch, capsys):
    parts = words(command)
    if parts[0] == "sbatch":
        name, arguments = "launch.doctor", parts[parts.index("launch/slurm.sbatch") + 1 :]
    else:
        name, arguments = parts[2], parts[3:]
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main(["--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"{a}\b", said) for a in arguments if a.startswith("--"))


@pytest.mark.parametrize("command", MAKE)
def test_each_target_is_there(command):
    subprocess.run(["make", "--dry-run", *words(command)[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def copy(tmp_path) -> Path:
    """The project, in a folder where commands may leave things."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", "corpus", "tokens", ".git"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(command: str, copy: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=copy, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
def test_the_page_for_a_laptop_runs_from_top_to_bottom(copy):
    for command in commands(ROOT / "docs/laptop.md"):
        run(command, copy)
    assert (copy / "compare.html").exists()
    assert (copy / "model/model.safetensors").exists()


def test_data_is_prepared_as_its_page_says(copy):
    for command in commands(ROOT / "docs/data.md"):
        if command.startswith("python -m data."):
            run(command, copy)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", [c for c in ALL if c.startswith(LONG)])
def test_the_long_ones(command, copy):
    run(command, copy)


@pytest.mark.gpu
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [c for c in ALL if c.startswith(GPU)])
def test_those_that_need_a_gpu(command, copy):
    run(command, copy)
