"""python -m launch.plan [--gpus N] [--gpu KIND] OVERRIDES...: will this run fit, what will it send, how fast may it be?

Arithmetic alone: no GPU, no model, no data. OVERRIDES are those of train.py. Prints the memory of a rank of each
pipeline stage, what ranks send each other in a step, and an estimate of the speed; --json writes them to a file.
Exit codes: 0 if it fits; 64 if it does not, with the overrides that would help most, or if the options are no run.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from typing import Any, Optional

from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import ConfigError, exit_code
from configs.kernels import without
from configs.options import Options, number, place, write
from configs.rules import check_sizes
from configs.schema import Config, Kind, Precision, Recompute, data_parallel, micro_batches
from launch.advice import advise
from launch.cluster import CONTEXT, EFFICIENCY, FRAGMENTED, GIB, GPUS, NCCL, NETWORK, NODE, Cluster
from launch.compose import compose, from_text
from parallel import memory, metrics, sizes, traffic
from parallel.memory import Memory
from parallel.traffic import Traffic

VOCABULARY = 50_304  # where nothing says how many tokens the data have


@dataclass(frozen=True)
class Plan:
    """Of one run on a cluster."""

    cfg: Config
    vocab: int
    cluster: Cluster
    stages: list[Memory]
    sent: list[list[Traffic]]  # by stage
    flops: metrics.Flops  # of a step, over all ranks
    bubble: float

    @property
    def fullest(self) -> Memory:
        """The stage that needs most."""
        return max(self.stages, key=lambda m: m.peak)

    def needed(self, m: Memory) -> float:
        """GiB of a GPU of a stage: the peak, what the allocator wastes, and what is outside of it."""
        p = self.cfg.parallel
        groups = sum(size > 1 for size in (self.cluster.gpus, p.tp, p.pp, data_parallel(self.cfg, self.cluster.gpus)))
        return m.peak / GIB * FRAGMENTED + CONTEXT + NCCL * groups

    @property
    def fits(self) -> bool:
        return self.needed(self.fullest) <= self.cluster.gpu.gib

    @property
    def attention(self) -> str:
        """What computes it, among EFFICIENCY."""
        if self.cfg.attention.kind is Kind.full:
            return "full"
        return "nsa without kernels" if without(self.cfg) else "nsa"

    def seconds(self, sent: Traffic) -> float:
        """That a kind of traffic takes where nothing else is to be done."""
        return sent.bytes / 1e9 / self.cluster.link(sent.span)

    @property
    def step(self) -> float:
        """Seconds of a step, an estimate: assumed efficiencies, and no communication hidden behind work."""
        f, attention = self.flops, EFFICIENCY[self.attention]
        work = (f.linear + self._again) / EFFICIENCY["linear"] + (f.total - f.linear) / attention
        if self.cfg.parallel.recompute is Recompute.full:
            work += (f.total - f.linear) / metrics.BACKWARD / attention
        waits = max(sum(map(self.seconds, sent)) for sent in self.sent)
        return work / self.cluster.gpus / self.cluster.gpu.peak / (1 - self.bubble) + waits

    @property
    def tokens_per_s(self) -> float:
        return self.cfg.train.global_batch * self.cfg.data.seq_len / self.step

    @property
    def mfu(self) -> float:
        return self.flops.total / self.step / self.cluster.gpus / self.cluster.gpu.peak

    @property
    def _again(self) -> float:
        """FLOPs of matrix products that are computed again in backward."""
        cfg, m = self.cfg, self.cfg.model
        forward = 2 * cfg.train.global_batch * cfg.data.seq_len
        after = forward * m.layers * m.dim * (3 * m.mlp_dim + m.heads * m.v_dim)
        whole = self.flops.linear / metrics.BACKWARD - forward * m.dim * self.vocab
        return {Recompute.none: 0.0, Recompute.mlp: after, Recompute.full: whole}[cfg.parallel.recompute]


def plan(cfg: Config, cluster: Cluster) -> Plan:
    """The arithmetic of a run that configs.rules allows. Raises ConfigError if its vocabulary cannot be cut."""
    vocab, world = vocabulary(cfg), cluster.gpus
    stages = memory.by_stage(cfg, vocab, world)
    sent = [traffic.of_stage(cfg, vocab, world, m.stage) for m in stages]
    row = metrics.flops(cfg, vocab, [cfg.data.seq_len])
    flops = metrics.Flops(**{part: cfg.train.global_batch * count for part, count in asdict(row).items()})
    return Plan(cfg, vocab, cluster, stages, sent, flops, traffic.bubble(cfg, world))


def vocabulary(cfg: Config) -> int:
    """As train.py has it, or one that is assumed."""
    size = cfg.model.vocab_size or -(-(cfg.data.random or VOCABULARY) // 128) * 128
    if size % cfg.parallel.tp:
        fix = f"set model.vocab_size to a multiple of {cfg.parallel.tp}"
        raise ConfigError("config", f"parallel.tp={cfg.parallel.tp}", f"does not divide the vocabulary of {size}", fix)
    return size


def show(p: Plan, console: Console) -> None:
    """Print it."""
    sent = [_traffic_table(p)] if p.cluster.gpus > 1 else []
    for part in [*_about(p), _memory_table(p), *sent, _speed(p)]:
        console.print(part, highlight=False)


def _about(p: Plan) -> list[str]:
    """What is planned, in words."""
    cfg, t = p.cfg, p.cfg.train
    assumed = "" if cfg.model.vocab_size or cfg.data.random else " (assumed: model.vocab_size says it)"
    model = f"{sizes.whole(cfg, p.vocab) / 1e9:,.3f} B parameters, vocabulary {p.vocab:,}{assumed}"
    model += ", embeddings tied" if cfg.model.tie_embeddings else ""
    world, gpu = p.cluster.gpus, p.cluster.gpu.name
    layout = f"tp {cfg.parallel.tp}, pp {cfg.parallel.pp}, dp {data_parallel(cfg, world)}, ZeRO {cfg.parallel.zero}"
    rows = f"{micro_batches(cfg, world)} micro-batches a rank of {t.micro_batch} x {cfg.data.seq_len:,} tokens"
    return [
        model,
        _attention(p),
        f"{world:,} x {gpu}: {layout}, recomputation {cfg.parallel.recompute.value}",
        f"a step: {t.global_batch * cfg.data.seq_len:,} tokens in {rows}; {p.flops.total / 1e12:,.1f} model TFLOP",
    ]


def _attention(p: Plan) -> str:
    """What attention is planned, and what computes it on GPUs."""
    backend, why = p.cfg.attention.backend.value, without(p.cfg)
    return {
        "full": "full attention, by torch's kernels",
        "nsa": f"nsa attention, by its Triton kernels (backend={backend})",
        "nsa without kernels": f"nsa attention by plain torch, without kernels (backend={backend}): {why}",
    }[p.attention]


def _speed(p: Plan) -> str:
    """The estimate, with what it assumes."""
    reached = ", ".join(f"{part} {100 * EFFICIENCY[part]:g}%" for part in ("linear", p.attention))
    assumed = f"assumes shares of the peak ({reached}), and that nothing that is sent hides behind work"
    waits = f"stages wait {p.bubble:.0%} of the time"
    slow = "" if p.cfg.train.precision is Precision.bf16 else ", as if in bf16"
    return f"estimate{slow}: {p.tokens_per_s:,.0f} tokens/s, MFU {p.mfu:.0%}; {waits}. It {assumed}."


def _shown(p: Plan) -> list[Memory]:
    """Stages to print: all of a few, else the ends and the fullest."""
    every = {0, p.fullest.stage.index, len(p.stages) - 1} if len(p.stages) > 4 else range(len(p.stages))
    return [p.stages[i] for i in sorted(every)]


def _memory_table(p: Plan) -> Table:
    shown = _shown(p)
    out = Table(box=box.SIMPLE)
    out.add_column("GiB of a rank", min_width=32)
    for m in shown:
        out.add_column(f"stage {m.stage.index}", justify="right")

    def add(name: str, values: list[float], how: str = "{:,.2f}", **style: Any) -> None:
        out.add_row(name, *(how.format(v) for v in values), **style)

    add("million parameters", [sum(m.parameters.values()) / 1e6 for m in shown], "{:,.1f}")
    for part in ("weights", "gradients", "optimizer", "buffers"):
        add(part, [getattr(m, part) / GIB for m in shown])
    names = dict.fromkeys(name for m in shown for name in m.activations)
    for name in names:
        add(f"  kept: {name}", [m.activations.get(name, 0) / GIB for m in shown])
    add("kept of a micro-batch", [sum(m.activations.values()) / GIB for m in shown])
    add("micro-batches in flight", [m.in_flight for m in shown], "{:d}")
    out.add_row("peak is at", *(m.when for m in shown))
    add("allocated at the peak", [m.peak / GIB for m in shown], style="bold")
    add("needed, with allowances", [p.needed(m) for m in shown])
    return out


def _traffic_table(p: Plan) -> Table:
    out = Table(box=box.SIMPLE)
    out.add_column("sent by a rank in a step", min_width=32)
    for heading in ("ranks", "GiB", "GB/s", "seconds"):
        out.add_column(heading, justify="right")
    for t in max(p.sent, key=lambda sent: sum(t.bytes for t in sent)):  # of the stage that sends most
        figures = f"{t.ranks:,}", f"{t.bytes / GIB:,.2f}", f"{p.cluster.link(t.span):,.0f}", f"{p.seconds(t):,.3f}"
        out.add_row(t.kind, *figures)
    return out


def record(p: Plan) -> dict[str, Any]:
    """The same for a machine. Memory in bytes where not in GiB, time in seconds."""
    return {
        "cluster": asdict(p.cluster),
        "fits": p.fits,
        "peak_gib": p.fullest.peak / GIB,
        "needed_gib": p.needed(p.fullest),
        "parameters": sizes.whole(p.cfg, p.vocab),
        "vocabulary": p.vocab,
        "model_flops": p.flops.total,
        "bubble": p.bubble,
        "estimate": {"step_s": p.step, "tokens_per_s": p.tokens_per_s, "mfu": p.mfu, "efficiency": EFFICIENCY},
        "attention": p.attention,
        "kept_by_block": memory.kept_by_block(p.cfg),
        "stages": [
            {**asdict(m), "held": m.held, "peak": m.peak, "when": m.when, "needed_gib": p.needed(m)} for m in p.stages
        ],
        "sent": [[{**asdict(t), "seconds": p.seconds(t)} for t in sent] for sent in p.sent],
    }


def read(overrides: list[str], world: int) -> Config:
    """The run that these overrides of train.py describe. Where its data are does not matter. Raises ConfigError."""
    program, *typed = sys.argv
    sys.argv = ["train.py", *overrides]
    try:
        text = compose(world, check_sizes)
    finally:
        sys.argv = [program, *typed]
    assert text is not None, overrides
    return from_text(text)


def run(args: argparse.Namespace) -> None:
    """Print and write the plan. Raises ConfigError if the run does not fit."""
    _check(args)
    cfg, cluster = read(args.overrides, args.gpus), Cluster(args.gpus, GPUS[args.gpu], args.node, args.network)
    p = plan(cfg, cluster)
    show(p, Console(width=None if sys.stdout.isatty() else 120))
    if args.json:
        write("--json", args.json, json.dumps(record(p), indent=1) + "\n")
    if not p.fits:
        where = f"stage {p.fullest.stage.index}, {p.fullest.when}"
        why = f"needs {p.needed(p.fullest):,.1f} GiB ({where}) of the {cluster.gpu.gib} of a GPU"
        advice = advise(cfg, cluster.gpus, cluster.gpu.gib, lambda c: _need(c, cluster))
        raise ConfigError("plan", f"{cluster.gpus} x {cluster.gpu.name}", why, advice)


def _check(args: argparse.Namespace) -> None:
    for override in args.overrides:
        if "=" not in override:
            raise ConfigError("option", override, "is no override", "see python -m launch.plan --help")


def _need(cfg: Config, cluster: Cluster) -> float:
    p = plan(cfg, cluster)
    return p.needed(p.fullest)


def main(argv: Optional[list[str]] = None) -> int:
    """Returns the exit code. `argv` replaces the command line."""
    about = (__doc__ or "").split("?", 1)[1]
    parser = Options("python -m launch.plan", about)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for train.py: model=8b parallel.tp=4")
    parser.add_argument("--gpus", type=number(int, 1), default=1, help="all of the cluster (1)")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="kind (h200)")
    parser.add_argument("--node", type=number(int, 1), default=NODE, help=f"GPUs of a node ({NODE})")
    parser.add_argument(
        "--network", type=number(float, 0.001), default=NETWORK, help=f"GB/s between nodes for each GPU ({NETWORK:.0f})"
    )
    parser.add_argument("--json", type=place, metavar="FILE", help="write the figures there")
    return exit_code(lambda: run(parser.parse_intermixed_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
