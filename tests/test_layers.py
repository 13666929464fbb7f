"""Who may import whom, and which packages belong to which files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"configs", "nsa", "data", "parallel", "launch", "train", "tests"}
MAY_IMPORT = {
    "configs": {"configs"},
    "nsa": {"nsa", "configs"},
    "data": {"data", "configs"},
    "parallel": {"parallel", "nsa", "configs"},
    "launch": OURS - {"tests", "train"},
    "train": OURS - {"tests"},
}
OWNERS = {
    "triton": ("nsa/",),
    "webdataset": ("data/",),
    "tiktoken": ("data/tokenizer.py",),
    "deepspeed": ("parallel/engine.py", "parallel/pipeline.py"),
    "hydra": ("train.py", "launch/"),
    "wandb": ("train.py", "launch/"),
    "wandb_workspaces": ("launch/dashboard.py",),
}
FILES = sorted(
    p.relative_to(ROOT) for folder in MAY_IMPORT for p in [*ROOT.glob(f"{folder}/**/*.py"), *ROOT.glob(f"{folder}.py")]
)


def imported(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            modules.add(node.module)
    return {m.split(".")[0] for m in modules}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports(path):
    layer = path.parts[0].removesuffix(".py")
    for module in imported(path):
        if module in OURS:
            assert module in MAY_IMPORT[layer], f"{path} imports {module}"
        for place in [OWNERS[module]] if module in OWNERS else []:
            assert str(path).startswith(place), f"{path} imports {module}, which belongs to {place}"


def test_every_layer_has_files():
    assert {p.parts[0].removesuffix(".py") for p in FILES} == set(MAY_IMPORT)


def test_files_stay_short():
    long = {str(p): n for p in FILES if (n := len((ROOT / p).read_text().splitlines())) > 450}
    assert not long
