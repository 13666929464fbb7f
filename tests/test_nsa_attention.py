"""Which backend attention takes, and what is refused: each in one line that names it.

test_nsa_kernels.py has what kernels compute, by Triton's interpreter.
"""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import Backend
from nsa import Documents, fused, nsa_attention, reference
from nsa.cases import make_inputs
from tests import kernels, tiny
from tests.kernels import CPU, SIZES, SMALL, interpreted


@interpreted
def test_only_asked_for_do_kernels_run_on_a_cpu(monkeypatch):
    x = make_inputs(SMALL, torch.float32)
    monkeypatch.setattr(fused, "nsa", lambda *_: "kernels")
    assert kernels.attend(SMALL, x, Backend.triton) == "kernels"
    plain = kernels.attend(SMALL, x, Backend.torch)
    assert torch.equal(kernels.attend(SMALL, x, Backend.auto), plain)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"v_dim": 6}, "the value width is 6; they take 16, 32"),
        ({"qk_dim": 7}, "the query and key width is 7; they take"),
        ({"heads": 6}, "6 heads share a KV head; they take groups of 1, 2, 4"),
        ({"sizes": replace(SIZES, l_slc=24)}, "l_slc is 24; they take 16, 32, 64"),
        ({"sizes": replace(SIZES, n=80)}, "n is 80 with local=2; they take at most 66"),
    ],
)
@interpreted
def test_what_the_kernels_do_not_take_is_named(changes, reason):
    case = replace(SMALL, **changes)
    with pytest.raises(ValueError, match=reason):
        kernels.attend(case, make_inputs(case, torch.float32))


@interpreted
@pytest.mark.parametrize("changes", [{"qk_dim": 128}, {"v_dim": 128}], ids=str)
def test_large_blocks_of_wide_fp32_heads_are_too_much_for_shared_memory(changes):
    case = replace(SMALL, sizes=replace(SIZES, l_slc=128), **changes)
    with pytest.raises(ValueError, match=r"l_slc is 128; with heads wider than 64 in float32 they take at most 64"):
        kernels.attend(case, make_inputs(case, torch.float32))


@interpreted
def test_the_kernels_take_no_fp64():
    with pytest.raises(ValueError, match=r"q is torch.float64; they take bfloat16"):
        kernels.attend(SMALL, make_inputs(SMALL, torch.float64))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_is_refused_before_a_run_starts(monkeypatch):
    from parallel import attention

    monkeypatch.setattr(fused, "INTERPRETED", False)
    cfg = tiny.config(attention__backend=Backend.triton, model__qk_dim=16, model__v_dim=16)
    with pytest.raises(ConfigError, match=r"attention.backend=triton: the kernels need a GPU"):
        attention.build(cfg, None, None)
    with pytest.raises(ValueError, match=r"q is on the cpu, and they run on a GPU"):
        kernels.attend(SMALL, make_inputs(SMALL, torch.float32))


def test_without_triton_there_is_the_definition():
    code = """
import sys
sys.modules["triton"] = None
import nsa
from configs.schema import Attention, Backend
nsa.check_backend(Attention())
try:
    nsa.check_backend(Attention(backend=Backend.triton))
except Exception as e:
    print(e)
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "error: config attention.backend=triton: triton is not installed; give torch or auto\n"


BAD = [
    ("k_slc", lambda t: t.double(), r"k_slc is torch.float64 on cpu; it must be torch.float32 on cpu as q is"),
    ("gates", lambda t: t.half(), r"gates is torch.float16 on cpu; it must be torch.float32"),
    ("gates", lambda t: t[..., :2], r"gates has the shape \(59, 2, 2\); .* it must be \(59, 2, 3\)"),
    ("q", lambda t: t.long(), r"q is torch.int64 of shape"),
    ("q", lambda t: t[0], r"q is torch.float32 of shape \(2, 8\)"),
    ("k_win", lambda t: t[:-1], r"k_win has the shape \(58, 1, 8\); .* it must be \(59, 1, 8\)"),
    ("v_slc", lambda t: t[..., :4], r"v_slc has the shape \(59, 1, 4\); .* it must be \(59, 1, 8\)"),
    ("k_cmp", lambda t: t.repeat(1, 2, 1), r"v_cmp has the shape .* it must be"),
    ("k_slc", lambda t: t[:, 0], r"k_slc has the shape \(59, 8\); it must have three dimensions"),
    ("k_slc", lambda t: None, r"k_slc is missing; the branches \['cmp', 'slc', 'win'\] need it"),
    ("k_cmp", lambda t: None, r"k_cmp is missing"),
    (
        "q",
        lambda t: t[:0],
        r"q is torch.float32 of shape \(0, 2, 8\); it must be \[tokens, heads, width\], none of them 0",
    ),
    ("q", lambda t: t[:, :0], r"q is torch.float32 of shape \(59, 0, 8\)"),
    ("q", lambda t: t.to(torch.float8_e4m3fn), r"q is torch.float8_e4m3fn of shape .* 16, 32 or 64 bit"),
    ("q", lambda t: t.to("meta"), r"gates is torch.float32 on cpu; it must be torch.float32 on meta as q is"),
    ("q", lambda t: t[:, :1].expand(-1, 3, -1), r"gates has the shape .* it must be \(59, 3, 3\)"),
    ("k_slc", lambda t: t.expand(-1, 2, -1), r"k_slc has the shape \(59, 2, 8\); .* it must be \(59, 1, 8\)"),
    ("k_cmp", lambda t: t[:, :0], r"q has 2 heads; it must have a multiple of the 0 KV heads"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD, ids=[f"{name} {i}" for i, (name, *_) in enumerate(BAD)])
def test_what_does_not_fit_is_named(name, change, message):
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        kernels.attend(SMALL, {**x, name: change(x[name])}, Backend.torch)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 2}, r"attention.n=2: smaller than the forced blocks .*; give at least 3"),
        ({"local": 0}, r"attention.local=0: out of range; give at least 1"),
        ({"initial": -1}, r"attention.initial=-1: out of range; give at least 0"),
        ({"w": 0}, r"attention.w=0: out of range"),
        ({"d": 3}, r"attention.l=8: not divisible by the stride attention.d=3"),
        ({"l": 32}, r"attention.l=32: larger than attention.l_slc=16"),
        ({"branches": []}, r"attention.branches=\[\]: no branch left"),
    ],
    ids=str,
)
def test_sizes_that_kernels_would_read_or_write_out_of_bounds_with_are_refused(changes, message):
    case = replace(SMALL, sizes=replace(SIZES, **changes))
    with pytest.raises(ValueError, match=message):
        kernels.attend(case, make_inputs(SMALL, torch.float32), Backend.torch)


def test_starts_that_are_not_of_these_documents_are_refused():
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}
    starts = Documents.of(torch.tensor([0, 20, 40, 59]), CPU).blocks(8, 4).starts
    with pytest.raises(ValueError, match=r"starts is \(\(2, 4\), torch.int32, .*; it must be \(\(2, 3\), torch.int32"):
        nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], SMALL.cu_seqlens, SIZES, starts)


@pytest.mark.parametrize("cu_seqlens", [[], [0], [[0, 5]], [0.0, 5.0], [False, True], [3, 5], [0, 5, 3]], ids=str)
def test_no_documents_are_made_of_what_is_none(cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens is .* must run from 0 to the number of tokens in whole numbers"):
        Documents.of(torch.tensor(cu_seqlens), CPU)


@pytest.mark.parametrize("backend", [Backend.torch, pytest.param(Backend.triton, marks=interpreted)])
@pytest.mark.parametrize("cu_seqlens", [[0, 50, 60], [1, 59], [0, 60, 59], [59], [], [[0, 59]], [0.0, 59.0]], ids=str)
def test_documents_that_are_none_are_refused(cu_seqlens, backend):
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    kv = {name: (x[f"k_{name}"], x[f"v_{name}"]) for name in ("slc", "win")}
    sizes = replace(SIZES, backend=backend)
    with pytest.raises(ValueError, match=r"cu_seqlens is .* it must run from 0 to 59"):
        nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], x["gates"], torch.tensor(cu_seqlens), sizes)


@pytest.mark.parametrize("backend", [Backend.torch, pytest.param(Backend.triton, marks=interpreted)])
def test_compressed_keys_of_other_documents_are_refused(backend):
    x = {n: t.detach() for n, t in make_inputs(SMALL, torch.float32).items()}
    fewer = {**x, "k_cmp": x["k_cmp"][:-1], "v_cmp": x["v_cmp"][:-1]}
    with pytest.raises(ValueError, match=r"k_cmp is \(11, 1, 8\); it must hold the 12 compression blocks"):
        kernels.attend(SMALL, fewer, backend)


def test_one_table_of_blocks_serves_all_layers():
    documents = Documents.of(torch.tensor([0, 50, 59]), CPU)
    blocks = documents.blocks(8, 4)
    assert documents.blocks(8, 4) is blocks
    assert blocks.first.tolist() == reference.block_starts(documents.cu_seqlens, 8, 4)[1].tolist()
    assert blocks.starts.tolist() == [[0, 50, 59], [0, 11, 12]]
    assert documents.positions.tolist() == [*range(50), *range(9)]
