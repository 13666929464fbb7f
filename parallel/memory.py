"""Memory of a rank by arithmetic: what it holds between steps, keeps of a micro-batch, and needs for a moment.

It describes what the modules beside it and DeepSpeed's optimizers allocate. Tests compare it with what autograd keeps
of real blocks and with the tensors of a real engine: who changes a block changes `kept_by_block`.
"""

from dataclasses import dataclass

import nsa.memory as by_kernels
import nsa.reference_memory as by_torch
from configs.kernels import without
from configs.schema import Config, Kind, Precision, Recompute, data_parallel, micro_batches
from parallel.metrics import blocks
from parallel.sizes import Stage, parameters, stages

# DeepSpeed's, from parallel/engine.py and its defaults: elements of a bucket of gradients, and of the parameters that
# ZeRO 3 keeps gathered.
BUCKET, GATHERED = 100_000_000, 1_000_000_000
WORKSPACE = 32 * 2**20  # cuBLAS on Hopper


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of a stage, as torch's allocator counts them."""

    stage: Stage
    parameters: dict[str, int]  # numbers of them, by part
    weights: int
    gradients: int
    optimizer: int  # fp32 master weights and both moments
    buffers: int  # of ZeRO, of the batch, of libraries
    activations: dict[str, int]  # kept of one micro-batch, by part, over all blocks of the stage
    in_flight: int  # micro-batches that are between forward and backward, at most
    moments: dict[str, int]  # beyond what is held between steps, at the moments that may be the peak

    @property
    def held(self) -> int:
        """Between steps."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    @property
    def when(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak(self) -> int:
        return self.held + self.moments[self.when]


def by_stage(cfg: Config, vocab: int, world: int) -> list[Memory]:
    """Of the ranks of each stage; those of one stage are alike."""
    return [_memory(cfg, vocab, world, stage) for stage in stages(cfg)]


def _memory(cfg: Config, vocab: int, world: int, stage: Stage) -> Memory:
    counts, dp, gas = parameters(cfg, vocab, stage), data_parallel(cfg, world), micro_batches(cfg, world)
    held = _held(cfg, sum(counts.values()), dp)
    # Tokens, labels and positions of the step; angles of RoPE.
    held["buffers"] += 24 * tokens(cfg) * gas + 4 * cfg.model.qk_dim * cfg.data.seq_len + WORKSPACE
    flight = min(stage.of - stage.index, gas)
    kept = {name: size * stage.blocks for name, size in kept_by_block(cfg).items()}
    if stage.of > 1:  # the engine has what a stage received and what it sent
        kept["boundaries"] = 2 * residual(cfg)
    moments = {
        "backward": flight * sum(kept.values()) + _backward(cfg) + 2 * residual(cfg),
        "update": _update(cfg, counts, dp),
    }
    if cfg.model.tie_embeddings and stage.first != stage.last:  # the other end's gradient, beside this one's
        moments["tied weight"] = 4 * cfg.model.dim * vocab // cfg.parallel.tp
    if stage.last:
        logits = width(cfg) * tokens(cfg) * vocab // cfg.parallel.tp
        kept |= {"head": width(cfg) * tokens(cfg) * cfg.model.dim + norm(cfg, fused=False), "logits": logits}
        moments["loss"] = sum(kept.values()) + _loss(cfg, vocab)
    return Memory(stage, counts, **held, activations=kept, in_flight=flight, moments=moments)


def tokens(cfg: Config) -> int:
    """Of a micro-batch."""
    return cfg.train.micro_batch * cfg.data.seq_len


def width(cfg: Config) -> int:
    """Bytes of an activation."""
    return 2 if cfg.train.precision is Precision.bf16 else 4


def compiled(cfg: Config) -> bool:
    """Whether a GPU runs blocks and loss compiled (parallel/compiler.py)."""
    return cfg.parallel.compile is not False


def outside(cfg: Config) -> int:
    """Tokens of a micro-batch that a rank has between tensor-parallel regions."""
    return tokens(cfg) // (cfg.parallel.tp if cfg.parallel.sequence else 1)


def residual(cfg: Config) -> int:
    """Bytes of the stream between blocks."""
    return width(cfg) * outside(cfg) * cfg.model.dim


def _held(cfg: Config, count: int, dp: int) -> dict[str, int]:
    """Weights, gradients, optimizer and buffers of `count` parameters of a rank, by ZeRO stage."""
    zero, w = cfg.parallel.zero, width(cfg)
    in_place = zero == 1 and cfg.train.precision is Precision.bf16  # gradients are reduced where they are summed
    gathered = w * min(count, GATHERED) * (zero == 3 and dp > 1)
    return {
        "weights": w * count // (dp if zero == 3 else 1),
        "gradients": 4 * count // (1 if zero == 1 else dp),
        "optimizer": 12 * count // dp,
        "buffers": gathered + (0 if in_place else w * BUCKET),
    }


def _update(cfg: Config, counts: dict[str, int], dp: int) -> int:
    """The most that clipping and AdamW hold at a time beside what stays."""
    if cfg.parallel.zero == 1:  # all in place
        return 0
    return 4 * sum(counts.values()) // dp  # the gradients of this rank once more, flat


def norm(cfg: Config, fused: bool) -> int:
    """Kept by RMSNorm: its input, in fp32 unless it is fused, and the reciprocal of the root mean square."""
    return outside(cfg) * ((width(cfg) if fused else 4) * cfg.model.dim + 4)


def kept_by_block(cfg: Config) -> dict[str, int]:
    """Bytes that are kept of one block and micro-batch on a rank until its backward, by part."""
    recompute = cfg.parallel.recompute
    if recompute is Recompute.full:
        return {"input of the block": residual(cfg)}
    if recompute is Recompute.mlp:
        return _attention(cfg) | ({} if compiled(cfg) else {"input of the block": residual(cfg)})
    return {**_attention(cfg), **_mlp(cfg)}


def _attention(cfg: Config) -> dict[str, int]:
    """Kept of the first half of a block, up to the input of the output projection."""
    m, tp, w, n = cfg.model, cfg.parallel.tp, width(cfg), tokens(cfg)
    heads, kv_heads = m.heads // tp, m.kv_heads // tp
    output = w * n * heads * m.v_dim
    out = {"norm of attention": norm(cfg, compiled(cfg)), "input of attention": w * n * m.dim}
    if cfg.attention.kind is Kind.nsa:
        sparse = by_torch if without(cfg) else by_kernels
        out |= {f"NSA: {name}": size for name, size in sparse.kept(nsa_shape(cfg), cfg.attention).items()}
        out["output of attention"] = output
    else:
        out["queries, keys, values"] = w * n * (heads * m.qk_dim + kv_heads * (m.qk_dim + m.v_dim))
        out["output of attention"] = output + 4 * n * heads  # and log-sum-exp
    return out


def _mlp(cfg: Config) -> dict[str, int]:
    """Kept of the second half of a block. Compiled, SiLU of the gate is computed again."""
    m, tp, w, n = cfg.model, cfg.parallel.tp, width(cfg), tokens(cfg)
    inside = (3 if compiled(cfg) else 4) * w * n * m.mlp_dim // tp
    return {"norm of MLP": norm(cfg, compiled(cfg)), "input of MLP": w * n * m.dim, "MLP": inside}


def nsa_shape(cfg: Config) -> by_kernels.Shape:
    """Of a rank's heads in a micro-batch of rows that are one document each."""
    m, a, tp, n, length = cfg.model, cfg.attention, cfg.parallel.tp, tokens(cfg), cfg.data.seq_len
    compressed = cfg.train.micro_batch * blocks(length, a.l, a.d)
    return by_kernels.Shape(n, length, compressed, m.heads // tp, m.kv_heads // tp, m.qk_dim, m.v_dim, width(cfg))


def _backward(cfg: Config) -> int:
    """The most that backward of the last block holds beside what was kept of all blocks."""
    m, tp, w, n = cfg.model, cfg.parallel.tp, width(cfg), tokens(cfg)
    mlp = 2 * w * n * m.mlp_dim // tp + 3 * w * m.dim * m.mlp_dim // tp  # also gradients of weights, until summed
    if cfg.attention.kind is Kind.nsa:
        attention = (by_torch if without(cfg) else by_kernels).backward(nsa_shape(cfg), cfg.attention)
    else:  # gradients of output, queries, keys and values; in fp32 sums of those of queries, and <do, o>
        heads = w * (m.heads * (m.qk_dim + m.v_dim) + m.kv_heads * (m.qk_dim + m.v_dim))
        attention = n * (heads + 4 * m.heads * (m.qk_dim + 1)) // tp
    first, second = sum(_attention(cfg).values()), sum(_mlp(cfg).values())
    recompute = cfg.parallel.recompute
    if recompute is Recompute.full:
        return first + max(second + mlp, attention)
    if recompute is Recompute.mlp:
        return max(second + mlp, attention)
    return max(mlp, attention - second)


def _loss(cfg: Config, vocab: int) -> int:
    """The most that loss and head hold at a time beside what was kept and the logits."""
    d, tp, w, n = cfg.model.dim, cfg.parallel.tp, width(cfg), tokens(cfg)
    head = w * (n * d + d * vocab // tp)  # gradients of its input and weight; that of the logits is written over them
    probabilities = 0 if compiled(cfg) else 3 * 4 * n * vocab // tp
    return max(head, probabilities)
