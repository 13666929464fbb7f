"""Every rule of the schema, each by a run that breaks it: the message names field, value and what to do."""

import pytest

from configs.errors import ConfigError
from configs.rules import check
from configs.schema import Backend, Branch, Compression, Kind, Precision, data_parallel, micro_batches
from tests import tiny

KERNELS = {"attention__backend": Backend.triton, "model__qk_dim": 16, "model__v_dim": 16}  # a GPU takes no less
BROKEN = [  # changes, processes, what the message must say
    (dict(model__layers=0), 1, ["model.layers=0", "at least 1"]),
    (dict(optim__lr=-1.0), 1, ["optim.lr=-1.0", "at least 0"]),
    (dict(optim__clip=0.0), 1, ["optim.clip=0.0", "above 0"]),
    (dict(optim__beta2=1.0), 1, ["optim.beta2=1.0", "below 1"]),
    (dict(model__vocab_size=0), 1, ["model.vocab_size=0", "null"]),
    (dict(data__path=" "), 1, ["data.path", "directory"]),
    (dict(data__random=100), 1, ["data.random=100", "beside data.path"]),
    (dict(data__random=0, data__path=None), 1, ["data.random=0", "at least 1"]),
    (dict(run__dir="runs/lr=1"), 1, ["run.dir=runs/lr=1", "without '='"]),
    (dict(run__time_limit="soon"), 1, ["run.time_limit=soon", "hours:minutes:seconds"]),
    (dict(run__time_limit="0:00"), 1, ["run.time_limit=0:00", "above 0"]),
    (dict(run__dir="./unused"), 1, ["run.dir", "is also data.path"]),
    (dict(model__kv_heads=3), 1, ["model.heads=8", "model.kv_heads=3"]),
    (dict(model__qk_dim=7), 1, ["model.qk_dim=7", "even"]),
    (dict(model__vocab_size=33, parallel__tp=2), 2, ["model.vocab_size=33", "parallel.tp=2"]),
    (dict(attention__l=6), 1, ["attention.l=6", "attention.d=4"]),
    (dict(attention__l_slc=18), 1, ["attention.l_slc=18", "attention.d=4"]),
    (dict(attention__l=32), 1, ["attention.l=32", "attention.l_slc=16"]),
    (dict(attention__n=2), 1, ["attention.n=2", "at least 3"]),
    (dict(attention__branches=[]), 1, ["attention.branches", "cmp, slc, win"]),
    (dict(attention__branches=[Branch.win] * 2), 1, ["attention.branches", "twice"]),
    (dict(attention__branches=[Branch.slc]), 1, ["attention.compression=mlp", "mean"]),
    (dict(data__skip=[[2, 1]]), 1, ["data.skip=[[2, 1]]", "[first, last]"]),
    (dict(data__skip=[[3, 4], [0, 1]]), 1, ["data.skip", "from 1"]),
    (dict(data__skip=[[1]]), 1, ["data.skip"]),
    (dict(data__skip=[1, 2]), 1, ["data.skip=[1, 2]", "[[first, last], ...]"]),
    (dict(data__skip=[["a", 2]]), 1, ["data.skip", "counted from 1"]),
    (dict(KERNELS, model__qk_dim=28), 1, ["attention.backend=triton", "key width is 28", "give torch or auto"]),
    (dict(KERNELS, model__v_dim=192), 1, ["attention.backend=triton", "value width is 192"]),
    (dict(KERNELS, model__heads=12), 1, ["attention.backend=triton", "3 heads share a KV head"]),
    (dict(KERNELS, attention__l_slc=48), 1, ["attention.backend=triton", "l_slc is 48"]),
    (dict(KERNELS, attention__n=80), 1, ["attention.backend=triton", "n is 80", "at most 66"]),
    (dict(KERNELS, model__qk_dim=128, attention__l_slc=128), 1, ["attention.backend=triton", "128", "in float32"]),
    (dict(guard__rollbacks=-1), 1, ["guard.rollbacks=-1"]),
    (dict(parallel__tp=2), 3, ["parallel.tp*pp=2", "3 processes"]),
    (dict(parallel__tp=8), 8, ["model.kv_heads=4", "parallel.tp=8"]),
    (dict(parallel__tp=4, model__mlp_dim=190), 4, ["model.mlp_dim=190", "parallel.tp=4"]),
    (dict(parallel__pp=8), 8, ["model.layers=4", "parallel.pp=8"]),
    (dict(parallel__zero=0), 1, ["parallel.zero=0", "1, 2 or 3"]),
    (dict(parallel__zero=2, parallel__pp=2), 2, ["parallel.zero=2", "parallel.pp=2"]),
    (dict(parallel__tp=2, parallel__sequence=True, data__seq_len=95), 2, ["data.seq_len=95", "parallel.tp=2"]),
    (dict(train__micro_batch=3), 1, ["train.global_batch=4", "train.micro_batch=3"]),
    (dict(), 16, ["train.global_batch=4", "16 data-parallel ranks"]),
    (dict(), 0, ["processes=0"]),
    (dict(wandb__project="a/b"), 1, ["wandb.project=a/b", "without /"]),
    (dict(wandb__project=""), 1, ["wandb.project="]),
    (dict(optim__lr=float("inf")), 1, ["optim.lr=inf", "finite"]),
    (dict(optim__min_lr=1.0), 1, ["optim.min_lr=1.0", "optim.lr=0.001"]),
]


@pytest.mark.parametrize(("changes", "world", "says"), BROKEN, ids=lambda v: str(v)[:60])
def test_a_broken_rule_is_named(changes, world, says):
    with pytest.raises(ConfigError) as e:
        check(tiny.config(**changes), world)
    message = str(e.value)
    assert message.startswith("error: config ")
    assert "\n" not in message
    for part in says:
        assert part in message


@pytest.mark.parametrize("world", [1, 2, 4])
def test_good_runs_pass(world):
    for kind in ("nsa", "full"):
        check(tiny.config(kind), world)
    check(tiny.config(attention__branches=[Branch.slc], attention__compression=Compression.mean), world)
    check(tiny.config(attention__branches=[Branch.win], attention__w=1), world)


def test_nsa_rules_do_not_bind_full_attention():
    check(tiny.config("full", attention__l=6), 1)
    with pytest.raises(ConfigError):
        check(tiny.config("full", attention__l=6, attention__kind=Kind.nsa), 1)


def test_sizes_that_follow():
    cfg = tiny.config(parallel__tp=2, train__micro_batch=2)
    assert data_parallel(cfg, 4) == 2
    assert micro_batches(cfg, 4) == 1
    assert micro_batches(cfg, 2) == 2


@pytest.mark.parametrize(
    "changes",
    [
        dict(KERNELS),
        dict(KERNELS, model__qk_dim=192, model__v_dim=128),
        dict(KERNELS, model__qk_dim=128, attention__l_slc=128, train__precision=Precision.bf16),
        dict(KERNELS, model__qk_dim=28, attention__backend=Backend.auto),
        dict(KERNELS, model__qk_dim=28, attention__kind=Kind.full),
    ],
    ids=str,
)
def test_what_the_kernels_take_or_nobody_asks_of_them_is_allowed(changes):
    check(tiny.config(**changes), 1)
