"""The arithmetic of memory against the real thing: parameters of built stages, tensors that autograd keeps of real
blocks, tensors of a real engine."""

import gc
import itertools

import pytest
import torch
from deepspeed.runtime.utils import partition_balanced

from configs.schema import Backend, Branch, Compression, Precision, Recompute
from data.synthetic import RandomRows
from nsa.documents import Documents
from parallel import memory, sizes
from parallel.engine import Engine
from parallel.mesh import Group, Mesh, build
from parallel.transformer import Transformer, layers
from tests import ranks, tiny

VOCAB, TOKENS = 512, 256
DEVICE = {"full": "cpu", "nsa": "cuda" if torch.cuda.is_available() else "meta"}  # where what a GPU keeps can be seen


def a_mesh(tp: int, device: str) -> Mesh:
    """Of one process that is told that it is the first of `tp`: enough to build layers."""
    alone = Group(None, 0, 1)
    return Mesh(0, tp, torch.device(device), Group(None, 0, tp), alone, alone, alone, control=None)


@pytest.mark.parametrize(("count", "pp"), [(4, 2), (5, 2), (7, 4), (16, 4), (30, 4), (126, 16)])
def test_stages_are_deepspeeds(count, pp):
    cut = partition_balanced([0] + [1] * count + [0], pp)
    theirs = [b - a for a, b in itertools.pairwise(cut)]
    theirs[0], theirs[-1] = theirs[0] - 1, theirs[-1] - 1  # embedding and head
    assert [s.blocks for s in sizes.stages(tiny.config(model__layers=count, parallel__pp=pp))] == theirs


LAYOUTS = [
    ("full", {}),
    ("full", dict(parallel__tp=2, parallel__pp=3, model__layers=7)),
    ("nsa", dict(model__qk_dim=12)),
    ("nsa", dict(parallel__tp=4, parallel__pp=2, attention__shared_kv=True)),
    (
        "nsa",
        dict(parallel__tp=2, attention__branches=[Branch.slc, Branch.win], attention__compression=Compression.mean),
    ),
    ("nsa", dict(attention__phi_hidden=20)),
    ("full", dict(model__tie_embeddings=True, parallel__tp=2, parallel__pp=2)),
]


@pytest.mark.parametrize(("kind", "changes"), LAYOUTS, ids=str)
def test_parameters_are_those_of_built_stages(kind, changes):
    cfg = tiny.config(kind, **changes)
    whole = layers(cfg, VOCAB, a_mesh(cfg.parallel.tp, "meta"))
    at = 0
    for stage in sizes.stages(cfg):
        count = stage.blocks + stage.first + stage.last
        with torch.device("meta"):
            built = [cls(*args) for cls, args in whole[at : at + count]]
        at += count
        parameters = sum(p.numel() for layer in built for p in layer.parameters())
        assert sum(sizes.parameters(cfg, VOCAB, stage).values()) == parameters, stage
    alone = tiny.change(cfg, parallel__tp=1)
    with torch.device("meta"):
        model = Transformer(alone, VOCAB, a_mesh(1, "meta"))
    assert sizes.whole(cfg, VOCAB) == sum(p.numel() for p in model.parameters())


def kept(cfg, mesh, vocab: int = VOCAB) -> int:
    """Bytes that autograd keeps of the blocks of a model, on a CPU or, with kernels, of shapes alone.

    Compiled by inductor's partitioner, which decides what is kept, without making code of it.
    """

    def compiled(f):
        backend = "aot_eager_decomp_partition"
        return torch.compile(f, backend=backend, dynamic=False) if memory.compiled(cfg) else f

    torch._dynamo.reset()
    device = mesh.device.type
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            made = [cls(*args) for cls, args in layers(tiny.change(cfg, parallel__compile=False), vocab, mesh)]
    finally:
        torch.set_default_dtype(torch.float32)
    found: dict[int, torch.Tensor] = {}

    def keep(x):
        found[x.untyped_storage()._cdata] = x
        return x

    blocks = made[1:-1]
    for block in blocks:
        block.before, block.after = compiled(block._before), compiled(block._after)
    blocks[0].attention.rope.turn = compiled(blocks[0].attention.rope.turn)
    documents = Documents(torch.tensor([0, TOKENS]), torch.zeros(TOKENS, dtype=torch.long, device=device))
    x = torch.zeros(memory.outside(cfg), cfg.model.dim, dtype=torch.bfloat16, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = x
        for block in blocks:
            out = block(out, documents)
    held = [t for block in made for t in block.parameters()] + [
        blocks[0].attention.rope.cos,
        blocks[0].attention.rope.sin,
    ]
    shared = {t.untyped_storage()._cdata for t in [*held, documents.positions]}
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in shared)


def wide(kind: str, **changes):
    """Blocks large enough for what does not grow with tokens to be little."""
    sizes_ = dict(model__dim=128, model__heads=8, model__kv_heads=2, model__qk_dim=32)
    sizes_ |= dict(model__v_dim=16 if kind == "nsa" else 32)  # for which a CPU has a kernel like that of a GPU
    blocks = dict(attention__l=16, attention__d=8, attention__l_slc=32, attention__n=5, attention__w=32)
    run = dict(
        model__layers=3, data__seq_len=TOKENS, train__precision=Precision.bf16, attention__backend=Backend.triton
    )
    return tiny.config(kind, **{**sizes_, **blocks, **run, **changes})


RECOMPUTE = list(Recompute)


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=str)
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_what_compiled_blocks_keep(kind, recompute):
    cfg = wide(kind, parallel__recompute=recompute)
    expected = cfg.model.layers * sum(memory.kept_by_block(cfg).values())
    assert kept(cfg, a_mesh(1, DEVICE[kind])) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=str)
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_what_blocks_keep_that_are_not_compiled(kind, recompute):
    cfg = wide(kind, parallel__recompute=recompute, parallel__compile=False)
    expected = cfg.model.layers * sum(memory.kept_by_block(cfg).values())
    norms = {Recompute.none: 2, Recompute.mlp: 1, Recompute.full: 0}[recompute]
    norms *= DEVICE[kind] != "cuda"  # elsewhere RMSNorm is no kernel, and what it gives before its scale is kept too
    expected += norms * cfg.model.layers * 4 * TOKENS * cfg.model.dim
    assert kept(cfg, a_mesh(1, DEVICE[kind])) == pytest.approx(expected, rel=0.02)


SPARSE = [
    dict(attention__shared_kv=True),
    dict(attention__compression=Compression.mean),
    dict(attention__branches=[Branch.slc, Branch.win], attention__compression=Compression.mean),
    dict(attention__branches=[Branch.win]),
    dict(attention__phi_hidden=96),
    dict(attention__phi_hidden=300),  # more than one kernel takes
]


@pytest.mark.parametrize("changes", SPARSE, ids=str)
def test_what_other_kinds_of_sparse_attention_keep(changes):
    cfg = wide("nsa", **changes)
    expected = cfg.model.layers * sum(memory.kept_by_block(cfg).values())
    assert kept(cfg, a_mesh(1, DEVICE["nsa"])) == pytest.approx(expected, rel=0.02)


def kept_here(sequence: bool) -> tuple[int, int]:
    cfg = wide("full", parallel__tp=2, parallel__sequence=sequence)
    return kept(cfg, build(2, 1)), cfg.model.layers * sum(memory.kept_by_block(cfg).values())


@pytest.mark.parametrize("sequence", [False, True])
def test_what_a_tensor_parallel_rank_keeps(sequence):
    for found, expected in ranks.run(2, kept_here, sequence):
        assert found == pytest.approx(expected, rel=0.02)


def storages() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    there = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]  # isinstance would wake lazy objects
    there += [t.grad for t in there if t.is_leaf and t.grad is not None]
    there = [t for t in there if t.device.type != "meta"]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in there}.values())


def bytes_of_an_engine(cfg) -> int:
    """What one has after a step."""
    place, before = build(cfg.parallel.tp, 1), storages()
    rows = RandomRows(VOCAB, cfg.data.seq_len, cfg.train.global_batch, 1, 0, place.dp.rank, place.dp.size)
    engine = Engine(cfg, VOCAB, place)
    engine.train_step(rows.next_step(), cfg.train.global_batch * cfg.data.seq_len, 1e-3)
    return storages() - before


@pytest.mark.parametrize(("zero", "tp"), [(1, 1), (1, 2), (2, 1), (3, 1)])
def test_what_an_engine_holds_between_steps(zero, tp):
    changes = dict(model__dim=256, model__qk_dim=32, model__v_dim=32, model__mlp_dim=512, data__seq_len=32)
    cfg = tiny.config("nsa", **changes, parallel__zero=zero, parallel__tp=tp, train__precision=Precision.bf16)
    expected = memory.by_stage(cfg, VOCAB, 2 * tp)[0]
    held = expected.held - memory.WORKSPACE
    if zero == 2:  # gradients and their bucket end with a step
        held -= expected.gradients + 2 * memory.BUCKET
    if zero == 3:  # what was gathered ends with a backward pass
        held -= 2 * sum(expected.parameters.values())
    for found in ranks.run(2 * tp, bytes_of_an_engine, cfg):
        assert found == pytest.approx(held, rel=0.02)
