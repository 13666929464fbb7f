"""What has to hold on a GPU: the definition computes there what it computes on a CPU, and layouts train alike."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.schema import Config, Precision, Recompute
from data.loader import Batch
from nsa.cases import CASES, Case, make_inputs
from parallel import mesh
from parallel.engine import Engine
from parallel.saver import Saver
from tests import ranks, test_engine, test_nsa_reference, test_train, tiny
from tests.test_parity import STEPS, train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "case", [*CASES, Case("several chunks", (700, 2500), qk_dim=32, v_dim=16)], ids=lambda c: c.name
)
def test_the_definition_on_a_gpu(case):
    results = []
    for device in ("cpu", "cuda"):
        x = make_inputs(case, torch.float64, device)
        o = test_nsa_reference.run(case, x)
        o.sin().sum().backward()
        results.append([o.detach().cpu(), *(t.grad.cpu() for t in x.values() if t.numel())])
    for cpu, gpu in zip(*results):
        torch.testing.assert_close(gpu, cpu, rtol=1e-8, atol=1e-8)


LAYOUTS = [
    {"tp": 2},
    {"tp": 2, "sequence": True, "recompute": Recompute.full},
    {"pp": 2},
    {"pp": 2, "recompute": Recompute.full},
    {"zero": 1},
    {"zero": 2},
    {"zero": 3, "recompute": Recompute.full},
]


def runnable(layouts: list[dict]) -> list[dict]:
    """Two processes can share a GPU through gloo, which moves no tensors of a GPU from one stage to the next."""
    return [x for x in layouts if torch.cuda.device_count() > 1 or "pp" not in x]


def can_run(layout: dict) -> None:
    if not runnable([layout]):
        pytest.skip("pipeline stages need a GPU each")


@pytest.fixture(scope="module", params=["nsa", "full"])
def one_gpu(request, corpus):
    cfg = tiny.config(request.param, data__path=corpus)
    return cfg, ranks.run(1, train, cfg, timeout=300)[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_in_fp32(one_gpu, layout):
    can_run(layout)
    cfg, expected = one_gpu
    cfg = tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()})
    for out in ranks.run(2, train, cfg, timeout=300):
        for step, (ours, theirs) in enumerate(zip(out, expected)):
            assert ours == pytest.approx(theirs, rel=1e-4), f"step {step}"


TIED = [{"tp": 2, "sequence": True}, {"pp": 2}, {"zero": 2}, {"zero": 3}]


def test_tied_embeddings(corpus):
    """Other processes make the same steps."""
    cfg = tiny.config("nsa", data__path=corpus, model__tie_embeddings=True)
    (expected,) = ranks.run(1, train, cfg, timeout=300)
    layouts = runnable(TIED)
    cut = [tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()}) for layout in layouts]
    for rank, found in enumerate(ranks.run(2, train_each, cut, timeout=400)):
        for layout, out in zip(layouts, found):
            for step, (ours, theirs) in enumerate(zip(out, expected)):
                assert ours == pytest.approx(theirs, rel=1e-4), f"rank {rank}, {layout}, step {step}"


def train_each(cfgs: list[Config], steps: int = STEPS) -> list[list[tuple[float, float]]]:
    out = []
    for cfg in cfgs:
        torch._dynamo.reset()  # it counts what was compiled for the others
        out.append(train(cfg, steps))
    return out


@pytest.mark.parametrize("zero", [1, 3])
def test_blocks_share_what_is_compiled(corpus, zero):
    test_engine.check_blocks_share_what_is_compiled(corpus, zero)


@pytest.mark.parametrize("layout", [{}, *LAYOUTS[1:5:2], LAYOUTS[4], LAYOUTS[-1]], ids=str)
def test_bf16_stays_near_fp32(one_gpu, layout):
    can_run(layout)
    cfg, exact = one_gpu
    changes = {f"parallel__{k}": v for k, v in layout.items()}
    cfg = tiny.change(cfg, train__precision=Precision.bf16, **changes)
    for out in ranks.run(2 if layout else 1, train, cfg, timeout=300):
        assert [loss for loss, _ in out] == pytest.approx([loss for loss, _ in exact], rel=5e-3)
        assert [norm for _, norm in out[:STEPS]] == pytest.approx([norm for _, norm in exact[:STEPS]], rel=0.05)


def fifty_losses(cfgs: list[Config]) -> list[torch.Tensor]:
    return [torch.tensor([loss for loss, _ in steps]) for steps in train_each(cfgs, 50)]


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_fifty_steps_in_bf16_stay_in_the_band_of_one_gpu(corpus, attention):
    """No further from its middle than twice its width at the widest, at any step. The band is of runs in which the sums
    over a batch are in other parts each time."""
    sizes = {"model__qk_dim": 16, "model__v_dim": 16, "train__precision": Precision.bf16}
    cfg = tiny.config(attention, data__path=corpus, **sizes)
    (alone,) = ranks.run(1, fifty_losses, [tiny.change(cfg, train__micro_batch=n) for n in (1, 2, 4)], timeout=400)
    losses = torch.stack(alone)
    middle, width = losses.mean(0), (losses.amax(0) - losses.amin(0)).max()
    assert 0 < width < 0.01 * middle.min()
    layouts = runnable([LAYOUTS[1], LAYOUTS[2], *LAYOUTS[-3:]])
    cut = [tiny.change(cfg, **{f"parallel__{k}": v for k, v in layout.items()}) for layout in layouts]
    for rank, found in enumerate(ranks.run(2, fifty_losses, cut, timeout=400)):
        off = {str(layout): float((ours - middle).abs().max()) for layout, ours in zip(layouts, found)}
        print(f"{attention}, rank {rank}: the band is {width:.1e} wide; off by", off)
        assert max(off.values()) <= 2 * width


def saves_of_a_billion(cfg: Config) -> tuple[list[dict], list[dict]]:
    """Two saves each way of 1.15 B parameters, with training behind where it can be; what each took, its files."""
    place = mesh.build(1, 1)
    engine = Engine(cfg, 50304, place)
    tokens = torch.zeros(1, cfg.data.seq_len, dtype=torch.int32)
    batch = Batch(tokens, tokens, torch.tensor([0, tokens.numel()]))
    engine.train_step([batch], tokens.numel(), 1e-4)
    reports, files, step = [], [], 0
    for asynchronous in (False, True):
        options = replace(cfg.checkpoint, asynchronous=asynchronous)
        began = time.perf_counter()
        saver = Saver(Path(cfg.run.dir), engine, place, options, reports.append)
        start = time.perf_counter() - began
        for _ in range(2):
            step += 1
            torch.cuda.synchronize()
            saver.save(step, {"step": step, "tokens": 0})
            while asynchronous and not saver.finished:
                engine.train_step([batch], tokens.numel(), 0.0)
            saver.wait(last=True)
            manifest = Path(cfg.run.dir, "checkpoints", f"step-{step:08d}", "MANIFEST.json")
            files.append(json.loads(manifest.read_text())["files"])
            reports[-1]["start_s"] = start
        del saver
    return reports, files


def test_training_stands_still_for_a_second_at_most_while_a_billion_parameters_are_saved(tmp_path):
    """The first save after the start has no longer either: memory is locked before."""
    sizes = {"layers": 16, "dim": 2048, "heads": 32, "kv_heads": 2, "qk_dim": 64, "v_dim": 64, "mlp_dim": 8192}
    cfg = tiny.config("full", **{f"model__{k}": v for k, v in sizes.items()}, run__dir=str(tmp_path))
    cfg = tiny.change(cfg, train__precision=Precision.bf16, train__global_batch=1, data__seq_len=1024)
    cfg = tiny.change(cfg, checkpoint__every=1, checkpoint__keep=1)
    ((reports, files),) = ranks.run(1, saves_of_a_billion, cfg, timeout=540)
    for r, how in zip(reports, ["synchronous"] * 2 + ["asynchronous"] * 2):
        took = f"stall {r['save_stall_s']:.2f} s, published in {r['save_background_s']:.1f} s"
        print(f"{how}, save {r['step']}: {r['save_gib']:.2f} GiB, {took}, {r['start_s']:.1f} s before the first step")
    assert files[0] == files[1] == files[2], "the copy is what was on the device"
    assert all(r["save_stall_s"] <= 1 for r in reports[2:])


@pytest.mark.parametrize("attention", ["nsa", "full"])
@pytest.mark.parametrize("layout", [[], ["parallel.zero=2"], ["parallel.tp=2"], ["parallel.pp=2"]], ids=str)
def test_a_continued_run_is_the_unbroken_one_bit_for_bit(corpus, tmp_path, attention, layout):
    """With deterministic=true, in bf16, by the kernels; sizes that they have."""
    processes = 2 if layout else 1
    if torch.cuda.device_count() < processes:
        pytest.skip("needs a GPU for each process")
    options = "model.dim=128 model.heads=8 model.kv_heads=2 model.qk_dim=32 model.v_dim=32 attention.l=16 attention.d=8"
    options += " train.precision=bf16 data.seq_len=512 train.steps=6 checkpoint.every=3 deterministic=true"
    options = [f"attention={attention}", *options.split(), *layout]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    test_train.train(corpus, whole, *options, processes=processes)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    (broken / "metrics.jsonl").unlink()
    test_train.train(corpus, broken, *options, processes=processes)
    expected = test_train.lines(whole)
    for step, m in test_train.lines(broken).items():
        assert step > 3
        assert [m[k] for k in ("loss", "grad_norm", "lr")] == [expected[step][k] for k in ("loss", "grad_norm", "lr")]
    ends = [json.loads((r / "checkpoints/step-00000006/MANIFEST.json").read_text())["files"] for r in (whole, broken)]
    assert ends[0] == ends[1]


def where() -> str:
    return str(mesh.build(1, 1).device)


def test_processes_use_the_gpus():
    assert ranks.run(1, where, timeout=120) == ["cuda:0"]
