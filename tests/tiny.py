"""A model small enough to train in a test, with every part of a large one."""

import copy
from typing import Any

from configs.schema import Attention, Config, Data, Kind, Model, Optim, Parallel, Precision, Run, Train


def config(kind: str = "nsa", **changes: Any) -> Config:
    """A tiny run; `changes` name fields with two underscores for the dot: parallel__tp=2."""
    cfg = Config(
        model=Model(name="tiny", layers=4, dim=64, heads=8, kv_heads=4, qk_dim=8, v_dim=8, mlp_dim=192),
        attention=Attention(kind=Kind(kind), l=8, d=4, l_slc=16, n=4, w=16),
        parallel=Parallel(timeout=60),
        data=Data(path="unused", seq_len=96),
        optim=Optim(lr=1e-3, min_lr=1e-4, warmup=2, clip=0.5),
        train=Train(steps=10, global_batch=4, micro_batch=1, precision=Precision.fp32),
        run=Run(dir="unused-run"),
    )
    return change(cfg, **changes)


def change(cfg: Config, **changes: Any) -> Config:
    """A copy with the named fields set."""
    cfg = copy.deepcopy(cfg)
    for key, value in changes.items():
        *path, leaf = key.split("__")
        node: Any = cfg
        for part in path:
            node = getattr(node, part)
        assert hasattr(node, leaf), key
        setattr(node, leaf, value)
    return cfg
