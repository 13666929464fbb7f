"""What the ranks of a layout send each other in a step, and how long pipeline stages wait, by arithmetic.

Bytes are those that one rank sends, with collectives in rings: (k - 1) / k of a tensor for an all-gather or a
reduce-scatter among k ranks, twice that for an all-reduce.
"""

from dataclasses import dataclass

from configs.schema import Config, Recompute, data_parallel, micro_batches
from parallel.memory import GATHERED, residual, tokens, width
from parallel.sizes import Stage, parameters


@dataclass(frozen=True)
class Traffic:
    """Of one kind, of a rank of a stage in a step."""

    kind: str
    ranks: int  # that talk with one another
    span: int  # ranks from the first of them to the last, where tensor-parallel ones are neighbours, then data-parallel
    bytes: int


def of_stage(cfg: Config, vocab: int, world: int, stage: Stage) -> list[Traffic]:
    """By kind; nothing for groups of one rank."""
    p, dp, gas = cfg.parallel, data_parallel(cfg, world), micro_batches(cfg, world)
    counts = parameters(cfg, vocab, stage)
    tied = cfg.model.tie_embeddings and stage.first != stage.last  # its gradient, between both ends of a pipeline
    out = [
        Traffic("tensor parallel", p.tp, p.tp, gas * _tensor(cfg, stage, counts)),
        Traffic("data parallel", dp, p.tp * dp, _data(cfg, sum(counts.values()), dp, gas)),
        Traffic("tied weight", 2 if tied else 1, world, 4 * cfg.model.dim * vocab // p.tp),
        Traffic("pipeline", p.pp, world, gas * residual(cfg) * ((not stage.first) + (not stage.last))),
    ]
    return [t for t in out if t.ranks > 1]


def _tensor(cfg: Config, stage: Stage, counts: dict[str, int]) -> int:
    """Of a micro-batch, in all-reduces of a whole [tokens, dim], or their halves under sequence parallelism."""
    p = cfg.parallel
    # Forward and backward of both regions of a block. What is computed again ends before its last collective.
    again = {Recompute.none: 0.0, Recompute.mlp: 1.0, Recompute.full: 1.5 if p.sequence else 1.0}[p.recompute]
    regions = stage.blocks * (4 + again) + stage.first + stage.last
    shared = counts["compression"] + (counts["norms"] if p.sequence else 0)  # gradients of weights all ranks have
    loss = 3 * 4 * tokens(cfg) * stage.last
    ring = 2 * (p.tp - 1) / p.tp
    return int(ring * (width(cfg) * (regions * tokens(cfg) * cfg.model.dim + shared) + loss))


def _data(cfg: Config, count: int, dp: int, gas: int) -> int:
    """Of a step, by ZeRO stage: gradients of `count` parameters summed, new weights fetched."""
    part, w = (dp - 1) / dp, width(cfg)
    if cfg.parallel.zero < 3:  # all-reduces in fp32: of the step's sums, or of each micro-batch
        return int(part * count * (2 * 4 * (gas if cfg.parallel.zero == 2 else 1) + w))
    again = max(0, count - GATHERED)  # not held from forward to backward
    return int(part * w * gas * (count + again + count))


def bubble(cfg: Config, world: int) -> float:
    """Share of a step in which a stage has nothing to do (1F1B)."""
    waits = cfg.parallel.pp - 1
    return waits / (micro_batches(cfg, world) + waits)
