"""A plan without a GPU: runs of any size, refusals with advice that is true, bytes that real layers send."""

import json

import pytest
import torch
import torch.distributed as dist

from configs.kernels import without
from configs.schema import Backend, Precision, Recompute
from data.synthetic import RandomRows
from launch import plan
from launch.advice import advise
from launch.cluster import GPUS, Cluster
from nsa.documents import Documents
from parallel import comm, memory, sizes, traffic
from parallel.engine import Engine
from parallel.mesh import build
from parallel.transformer import Transformer
from tests import ranks, tiny
from tests.test_memory import TOKENS, VOCAB, wide

RUNS = [
    ("experiment=bench_1b", 1),
    ("experiment=bench_1b attention=nsa model.kv_heads=2 data.seq_len=65536 train.global_batch=1", 1),
    ("model=160m data.path=/nowhere train.micro_batch=1", 2),
    ("model=8b data=long parallel.recompute=full parallel.tp=4 parallel.pp=4 train.micro_batch=1", 64),
    (  # 1.0 T parameters
        "model=8b model.layers=128 model.dim=25600 model.heads=256 model.kv_heads=16 model.qk_dim=192 model.v_dim=128 "
        "model.mlp_dim=68000 data.seq_len=8192 train.global_batch=2048 train.micro_batch=1 parallel.tp=16 "
        "parallel.pp=16 parallel.sequence=true parallel.recompute=full",
        16384,
    ),
]


@pytest.mark.parametrize(("overrides", "gpus"), RUNS, ids=lambda v: str(v)[:50])
def test_a_plan_of_any_size(overrides, gpus, tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan.main([*overrides.split(), "--gpus", str(gpus), "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["cluster"]["gpus"] == gpus
    assert found["fits"]
    assert found["peak_gib"] < found["needed_gib"] <= found["cluster"]["gpu"]["gib"]
    assert found["parameters"] > 1e8
    assert 0 <= found["bubble"] < 1
    kinds = {1: set(), 2: {"data parallel"}}.get(gpus, {"tensor parallel", "data parallel", "pipeline"})
    assert {t["kind"] for t in found["sent"][0]} == kinds
    said = capsys.readouterr().out
    assert "allocated at the peak" in said
    assert "estimate: " in said


def test_a_larger_cluster_has_less_on_each_gpu():
    cfg = plan.read("model=8b data.seq_len=8192 train.global_batch=1024 train.micro_batch=1".split(), 8)
    peaks = [plan.plan(cfg, Cluster(world, GPUS["h200"])).fullest.peak for world in (8, 64, 1024)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] - peaks[1] == pytest.approx(12 * sizes.whole(cfg, 50304) * (1 / 8 - 1 / 64), rel=0.01)


def test_a_tied_weight_is_once_in_the_model_and_on_both_ends_of_a_pipeline(capsys):
    line, world, matrix = "model=8b train.micro_batch=1 model.vocab_size=65536".split(), 8, 4096 * 65536
    cut = ["parallel.pp=4", "parallel.tp=2"]
    untied, one, four = (
        plan.plan(plan.read([*line, *more], world), Cluster(world, GPUS["h200"]))
        for more in ([], ["model.tie_embeddings=true"], ["model.tie_embeddings=true", *cut])
    )
    totals = [sizes.whole(p.cfg, p.vocab) for p in (untied, one, four)]
    assert totals == [totals[0], totals[0] - matrix, totals[0] - matrix]
    assert untied.flops == one.flops == four.flops, "the product with the head is made in any case"
    assert sum(one.stages[0].parameters.values()) == totals[1]
    ends = [s.parameters["embedding"] + s.parameters["head"] for s in four.stages]
    assert ends == [matrix // 2, 0, 0, matrix // 2]
    assert [s.moments.get("tied weight") for s in four.stages] == [2 * matrix, None, None, 2 * matrix]
    assert [sum(t.bytes for t in sent if t.kind == "tied weight") for sent in four.sent] == [
        2 * matrix,
        0,
        0,
        2 * matrix,
    ]
    assert "tied weight" not in {t.kind for t in one.sent[0]}
    assert plan.main([*line, *cut, "model.tie_embeddings=true", "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "embeddings tied" in said
    assert "tied weight" in said


BACKENDS = [
    ("attention=full", "full attention, by torch's kernels"),
    ("attention.backend=auto", "by its Triton kernels (backend=auto)"),
    ("attention.backend=torch", "by plain torch, without kernels (backend=torch): as asked for"),
    ("model.qk_dim=80 model.v_dim=72", "by plain torch, without kernels (backend=auto): the value width is 72"),
]


@pytest.mark.parametrize(("overrides", "says"), BACKENDS)
def test_it_plans_for_what_computes_attention_on_gpus(overrides, says, tmp_path, capsys):
    file = tmp_path / "plan.json"
    line = f"model=1b data.seq_len=8192 train.micro_batch=1 --json {file}".split()
    assert plan.main([*line, *overrides.split()]) == 0
    assert says in " ".join(capsys.readouterr().out.split())
    planned = json.loads(file.read_text())
    kernels = "NSA: chosen blocks" in planned["kept_by_block"]
    assert planned["attention"] == ("full" if "full" in says else "nsa" if kernels else "nsa without kernels")
    assert kernels == ("Triton" in says)
    assert (planned["estimate"]["tokens_per_s"] < 20_000) == ("plain torch" in says)


@pytest.mark.parametrize("model", ["160m", "1b", "8b", "paper"])
def test_models_for_gpus_have_sizes_that_the_kernels_take(model):
    assert without(plan.read([f"model={model}"], 1)) is None


REFUSED = [
    ("model=8b data.seq_len=65536 train.micro_batch=2 parallel.tp=2 --gpus 8", "parallel.recompute=full", ", or "),
    ("model=8b data.seq_len=16384 train.micro_batch=1 --gpus 1", "parallel.recompute=full", "too much"),
    ("model=8b data.seq_len=65536 train.micro_batch=2 parallel.tp=2 --gpus 8 --gpu h100", "recompute=full", " and "),
    ("experiment=bench_1b data.seq_len=1048576 train.global_batch=1", "data.seq_len=524288 and", "recompute=full ("),
    ("model=8b model.layers=1000 --gpus 8 train.micro_batch=1", "recompute=full and parallel.", "still too much"),
    ("model=160m data.seq_len=8192 train.micro_batch=16 --gpu l4", "train.micro_batch=4", "parallel.recompute=full"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "first", "second"), REFUSED, ids=lambda v: str(v)[:50])
def test_what_does_not_fit_is_refused_with_what_would_help(line, first, second, capsys):
    assert plan.main(line.split()) == 64
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: plan ")
    assert first in error
    assert second in error


def test_advice_is_true():
    line = "model=8b data.seq_len=65536 train.micro_batch=2 parallel.tp=2".split()
    world, gpu = 8, GPUS["h200"]
    cfg = plan.read(line, world)
    assert not plan.plan(cfg, Cluster(world, gpu)).fits

    def need(c):
        made = plan.plan(c, Cluster(world, gpu))
        return made.needed(made.fullest)

    advice = advise(cfg, world, gpu.gib, need)
    override = advice.split()[1]
    better = need(plan.read([*line, override], world))
    assert better <= gpu.gib
    assert f"{override} ({better:,.1f} GiB)" in advice


MISTAKES = [
    ("--gpus 0", "--gpus: 0"),
    ("--network -1", "--network: -1"),
    ("oops", "oops"),
    ("model=nothing", "nothing"),
    ("parallel.tp=2 --gpus 3", "3 processes"),
    ("parallel.zero=0", "parallel.zero=0"),
    ("model.vocab_size=1001 model.kv_heads=2 parallel.tp=2 --gpus 2", "model.vocab_size=1001"),
    ("--gpus 99999999999", "train.global_batch=16"),
    ("--json /dev/null/plan.json", "--json /dev/null/plan.json"),
]


@pytest.mark.parametrize(("line", "says"), MISTAKES)
def test_a_mistake_is_one_line(line, says, capsys):
    assert plan.main(line.split()) == 64
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error


def sent_by_layers(cfg) -> float:
    """Bytes that a pass forward and backward really gives to collectives, as rings send them."""
    place, sent = build(cfg.parallel.tp, 1), [0.0]
    model = Transformer(cfg, VOCAB, place).bfloat16()
    ring, real = (place.tp.size - 1) / place.tp.size, (dist.all_reduce, comm.all_gather, comm.reduce_scatter)

    def all_reduce(x, *args, **kwargs):
        sent[0] += 2 * ring * x.nbytes
        return real[0](x, *args, **kwargs)

    def gathered(x, group):
        sent[0] += ring * x.nbytes * group.size
        return real[1](x, group)

    def scattered(out, x, group):
        sent[0] += ring * x.nbytes
        return real[2](out, x, group)

    documents = Documents(torch.tensor([0, TOKENS]), torch.arange(TOKENS))
    dist.all_reduce, comm.all_gather, comm.reduce_scatter = all_reduce, gathered, scattered
    model(torch.zeros(TOKENS, dtype=torch.long), documents).sum().backward()
    return sent[0]


@pytest.mark.parametrize("recompute", list(Recompute), ids=str)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_what_tensor_parallel_ranks_send(kind, sequence, recompute):
    layout = dict(parallel__tp=2, parallel__sequence=sequence, parallel__recompute=recompute, parallel__compile=False)
    cfg = wide(kind, **layout, train__global_batch=1, attention__backend=Backend.torch)
    stage = sizes.stages(cfg)[0]
    (expected,) = traffic.of_stage(cfg, VOCAB, 2, stage)
    loss = 2 * 0.5 * 3 * 4 * memory.tokens(cfg)
    for found in ranks.run(2, sent_by_layers, cfg):
        assert found == pytest.approx(expected.bytes - loss, rel=0.001)


def reduced_by_an_engine(cfg) -> int:
    """Bytes that DeepSpeed gives to all-reduces of gradients in a step."""
    place, found = build(1, 1), []
    rows = RandomRows(VOCAB, cfg.data.seq_len, cfg.train.global_batch, 1, 0, place.dp.rank, place.dp.size)
    engine, real = Engine(cfg, VOCAB, place), dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        found.append(tensor.nbytes)
        return real(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    engine.train_step(rows.next_step(), cfg.train.global_batch * cfg.data.seq_len, 1e-3)
    return sum(found)


@pytest.mark.parametrize("zero", [1, 2])
def test_what_data_parallel_ranks_reduce(zero):
    run = dict(train__precision=Precision.bf16, train__global_batch=6, data__seq_len=32)  # three micro-batches
    cfg = tiny.config("nsa", **run, parallel__zero=zero)
    (expected,) = traffic.of_stage(cfg, VOCAB, 2, sizes.stages(cfg)[0])
    fetched = 0.5 * 2 * sizes.whole(cfg, VOCAB)
    for found in ranks.run(2, reduced_by_an_engine, cfg):
        assert 2 * 0.5 * found == pytest.approx(expected.bytes - fetched, rel=0.01)
