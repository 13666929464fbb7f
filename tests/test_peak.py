"""The peak of a whole step: every tensor that a real engine makes is followed, and compared with the arithmetic."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configs.schema import Backend, Config, Kind, Precision, Recompute, data_parallel
from data.synthetic import RandomRows
from parallel import memory, tied
from parallel.engine import Engine
from parallel.mesh import Group, build
from tests import ranks, tiny
from tests.test_memory import storages


class Live(TorchDispatchMode):
    """Follows the storages that operators make: bytes `now`, and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.follow(x)
        return out

    def follow(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if x.device.type != "meta" and key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._end, key)

    def _end(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def follow_a_step(cfg: Config, vocab: int, live: Live) -> int:
    """The second step of an engine. Returns the bytes that `live` does not see of what the engine holds."""
    place = build(cfg.parallel.tp, cfg.parallel.pp)
    t, targets = cfg.train, cfg.train.global_batch * cfg.data.seq_len
    rows = RandomRows(vocab, cfg.data.seq_len, t.global_batch, t.micro_batch, 0, place.dp.rank, place.dp.size)
    before = storages()
    engine = Engine(cfg, vocab, place)
    engine.train_step(rows.next_step(), targets, 1e-3)
    held = storages() - before
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor):
            live.follow(x)
    start = live.now
    with live:
        engine.train_step(rows.next_step(), targets, 1e-3)
    return held - start


def peak_of_a_step(cfg: Config, vocab: int) -> int:
    """Bytes, all that the engine holds included."""
    live = Live()
    return follow_a_step(cfg, vocab, live) + live.peak


def peak_of_an_exchange(cfg: Config, vocab: int) -> int:
    """The same, while both ends of a pipeline add up the gradients of a tied weight."""
    live, peaks, add = Live(), [], tied.add_the_others

    def watched(x: torch.Tensor, stages: Group) -> None:
        live.peak = live.now
        add(x, stages)
        peaks.append(live.peak)

    tied.add_the_others = watched
    return follow_a_step(cfg, vocab, live) + peaks[-1]


LAYOUTS = [
    (1, 512, {}),
    (1, 16384, {}),  # where the loss is the peak by far
    (1, 512, dict(parallel__recompute=Recompute.mlp)),
    (1, 512, dict(parallel__recompute=Recompute.full)),
    (2, 512, dict(parallel__zero=2)),
    (2, 512, dict(parallel__zero=3)),
    (2, 512, dict(parallel__tp=2)),
    (2, 512, dict(parallel__tp=2, parallel__sequence=True, parallel__recompute=Recompute.mlp)),
    pytest.param(2, 16384, dict(parallel__pp=2, train__global_batch=4), marks=pytest.mark.slow),
    (1, 512, dict(train__precision=Precision.fp32)),
    (1, 512, dict(attention__kind=Kind.nsa)),  # in torch: there are no kernels
]


@pytest.mark.parametrize(("world", "vocab", "changes"), LAYOUTS, ids=str)
def test_the_peak_of_a_step(world, vocab, changes):
    sizes = dict(model__dim=256, model__kv_heads=2, model__qk_dim=32, model__v_dim=32, model__mlp_dim=1024)
    run = dict(data__seq_len=1024, train__precision=Precision.bf16, train__global_batch=2, parallel__compile=False)
    cfg = tiny.config("full", attention__backend=Backend.torch, **{**sizes, **run, **changes})
    found = ranks.run(world, peak_of_a_step, cfg, vocab)
    stages = memory.by_stage(cfg, vocab, world)
    for rank, peak in enumerate(found):
        m = stages[rank * len(stages) // world]
        # RMSNorm is no kernel on a CPU, and what it gives before its scale is kept too, in fp32.
        norms = {Recompute.none: 2 * m.stage.blocks, Recompute.mlp: m.stage.blocks, Recompute.full: 2}
        off = (norms[cfg.parallel.recompute] * m.in_flight + m.stage.last) * 4 * memory.outside(cfg) * cfg.model.dim
        # And AdamW is not fused there: two tensors more for the larger group of weights.
        update = 8 * (sum(m.parameters.values()) - m.parameters["norms"]) // data_parallel(cfg, world)
        off, update = (0, 0) if torch.cuda.is_available() else (off, update)
        expected = m.held - memory.WORKSPACE + max(m.moments[m.when] + off, update)
        assert peak == pytest.approx(expected, rel=0.06), (rank, m.when)


def test_the_exchange_of_a_tied_gradient():
    cfg = tiny.config("full", parallel__pp=2, model__tie_embeddings=True, train__precision=Precision.bf16)
    expected = [m.held - memory.WORKSPACE + m.moments["tied weight"] for m in memory.by_stage(cfg, 16384, 2)]
    assert ranks.run(2, peak_of_an_exchange, cfg, 16384) == pytest.approx(expected, rel=0.03)


def peak_of_a_gpu(cfg: Config, vocab: int) -> int:
    """As torch's allocator counts it, of the third step."""
    place, t = build(1, 1), cfg.train
    rows = RandomRows(vocab, cfg.data.seq_len, t.global_batch, t.micro_batch, 0, 0, 1)
    engine = Engine(cfg, vocab, place)
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        engine.train_step(rows.next_step(), t.global_batch * cfg.data.seq_len, 1e-3)
    return torch.cuda.max_memory_allocated()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", list(Recompute), ids=str)
@pytest.mark.parametrize("kind", ["full", "nsa"])
def test_the_peak_of_a_step_on_a_gpu(kind, recompute):
    sizes = dict(model__dim=1024, model__heads=16, model__kv_heads=1, model__qk_dim=64, model__v_dim=64)
    sizes |= dict(model__mlp_dim=4096, model__layers=8, data__seq_len=8192, train__global_batch=2)
    blocks = dict(attention__l=32, attention__d=16, attention__l_slc=64, attention__n=16, attention__w=512)
    cfg = tiny.config(kind, **sizes, **blocks, train__precision=Precision.bf16, parallel__recompute=recompute)
    (found,) = ranks.run(1, peak_of_a_gpu, cfg, 32768, timeout=500)
    assert found == pytest.approx(memory.by_stage(cfg, 32768, 1)[0].peak, rel=0.1)
