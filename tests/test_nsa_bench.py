"""The benchmark of NSA: its floors, its parts, its picture; and on a GPU a small run of it."""

import json

import pytest
import torch

from configs.schema import Attention
from nsa import Documents, NSACore, bench
from nsa.parts import parts
from tests.kernels import interpreted


def test_floors_are_those_of_the_arithmetic():
    """Ms at 790 TFLOP/s and 4.3 TB/s for 64 heads of 128, worked out by hand for each piece and rounded."""
    shape = bench.Shape.of("64,4,128")
    for tokens, forward, backward in ((8192, 0.76, 2.3), (65536, 13.8, 35.8), (131072, 44.7, 110.6)):
        floor = bench.floors(shape, tokens, Attention(), 790, 4.3)
        assert floor == pytest.approx({"fwd": forward, "bwd": backward}, rel=0.04)


@pytest.mark.parametrize("text", ["64,4", "64,4,x", "64,0,128", "10,4,64"])
def test_shapes_that_are_none(text, capsys):
    assert bench.main(["--shape", text]) == 64
    assert capsys.readouterr().err.startswith(f"error: shape {text}: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert bench.main([]) == 64
    assert capsys.readouterr().err == (
        "error: device cuda: the benchmark times kernels on a GPU, and there is none; run it on one\n"
    )


@interpreted
def test_all_parts_run():
    a, cpu, generator = Attention(l=8, d=4, l_slc=16, n=4, w=12), torch.device("cpu"), torch.Generator().manual_seed(0)
    core = NSACore(a, 8, 8)
    for p in core.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    shapes = {"q": (70, 2, 8), "gates": (70, 2, 3)}
    shapes |= {f"{x}_{name}": (70, 1, 8) for x in "kv" for name in ("cmp", "slc", "win")}
    x = {name: torch.rand(size, generator=generator).requires_grad_() for name, size in shapes.items()}
    documents = Documents.of(torch.tensor([0, 70]), cpu)
    calls, overlap = parts(core, x, torch.randn(70, 2, 8, generator=generator), documents)
    for call in (call for kind in calls.values() for call in kind.values()):
        call()
    assert list(calls) == ["fwd", "bwd", "of these"]
    assert 0.3 < overlap <= 1, "the first block alone, forced, is a third to a half"


def test_rows_become_a_table_and_a_picture(tmp_path, capsys):
    times = {
        f"{name} {way}": {"ms": 2.0, "spread": 0.1, "eager": 2.5} for name in ("NSA", "cuDNN") for way in ("fwd", "bwd")
    }
    rows = [
        {
            "shape": "64,4,128",
            "tokens": t,
            "inputs": "random",
            "overlap": 0.5,
            "times": times,
            "parts": {"fwd": {"a": 1.0}},
        }
        for t in (8192, 16384)
    ]
    for row in rows:
        bench.compare(row, times, {"fwd": 1.0, "bwd": 1.5})
        bench.show(row)
    said = capsys.readouterr().out
    assert "cuDNN x  1.00" in said
    assert "floor 75%" in said
    bench.plot(rows, tmp_path / "nsa.png")
    assert (tmp_path / "nsa.png").stat().st_size > 10_000


@pytest.mark.gpu
def test_a_small_run(tmp_path, capsys):
    assert bench.main(["--shape", "4,2,64", "--lengths", "1024,2048", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "nsa.json").read_text())["rows"]
    assert [(row["tokens"], row["inputs"]) for row in rows] == [
        (t, kind) for t in (1024, 2048) for kind in ("random", "trained-like")
    ]
    assert rows[2]["overlap"] < rows[3]["overlap"]
    assert {"NSA fwd", "NSA bwd", "cuDNN fwd", "FA2 bwd"} <= rows[0]["times"].keys()
    assert (tmp_path / "nsa.png").exists()
