"""The model: a Llama-style decoder as a list of layers, each taking (x, documents); a pipeline can cut it anywhere.

Activations are flat over the tokens of a micro-batch: [n, dim], or [n/tp, dim] under sequence parallelism.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.schema import Config, Recompute
from parallel import attention, tied
from parallel.attention import Documents
from parallel.compiler import compiler
from parallel.mesh import Mesh
from parallel.mlp import MLP
from parallel.rope import Rope
from parallel.tensor import ColumnLinear, RMSNorm, TensorParallel, VocabEmbedding, columns


class Embedding(nn.Module):
    """tokens [n] -> [n, dim]."""

    def __init__(self, vocab: int, dim: int, tp: TensorParallel):
        super().__init__()
        self.tokens = VocabEmbedding(vocab, dim, tp)

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        return self.tokens(tokens)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual: [n, dim] -> [n, dim]."""

    def __init__(self, cfg: Config, tp: TensorParallel, rope: Rope):
        super().__init__()
        self.recompute = cfg.parallel.recompute
        self.attention_norm = RMSNorm(cfg.model.dim, cfg.model.norm_eps, tp)
        self.attention = attention.build(cfg, tp, rope)
        self.mlp_norm = RMSNorm(cfg.model.dim, cfg.model.norm_eps, tp)
        self.mlp = MLP(cfg.model, tp)
        # All but attention itself, whose kernels are operators already and take documents of any number.
        compiled = compiler(cfg.parallel, rope.cos.device)
        self.before, self.after = compiled(self._before), compiled(self._after)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        # Recomputation happens here, not in the pipeline engine: the documents are an argument of this call, and by the
        # time of backward the pipeline is at another micro-batch.
        return _kept(self.recompute is not Recompute.full, self._forward, x, documents)

    def _forward(self, x: Tensor, documents: Documents) -> Tensor:
        o = self.attention.attend(self.before(x), documents)
        return _kept(self.recompute is not Recompute.mlp, self.after, x, o)

    def _before(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.attention.project(self.attention_norm(x))

    def _after(self, x: Tensor, o: Tensor) -> Tensor:
        x = x + self.attention.output(o)
        return x + self.mlp(self.mlp_norm(x))


def _kept(keep: bool, work: Callable[..., Tensor], *args: Any) -> Tensor:
    """What `work` gives; unless `keep`, what it would keep for backward is computed again there. Nothing is drawn at
    random, so no RNG state is kept either."""
    if keep or not torch.is_grad_enabled():
        return work(*args)
    return checkpoint(work, *args, use_reentrant=False, preserve_rng_state=False)


class Head(nn.Module):
    """[n or n/tp, dim] -> logits [n, vocab/tp]."""

    def __init__(self, cfg: Config, vocab: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.norm = RMSNorm(cfg.model.dim, cfg.model.norm_eps, tp)
        self.output = ColumnLinear(cfg.model.dim, vocab, tp)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        (logits,) = columns(self.tp, self.norm(x), self.output)
        return logits


Layer = tuple[Callable[..., nn.Module], tuple]


def layers(cfg: Config, vocab: int, mesh: Mesh) -> list[Layer]:
    """The layers of the whole model in order, each as (class, arguments): a stage builds only its own."""
    tp = TensorParallel(mesh.tp, cfg.parallel.sequence)
    compiled = compiler(cfg.parallel, mesh.device, dynamic=None)  # of compressed keys there are now more, now fewer
    rope = Rope(cfg.model.qk_dim, cfg.data.seq_len, cfg.model.rope_theta, mesh.device, compiled)
    blocks: list[Layer] = [(Block, (cfg, tp, rope)) for _ in range(cfg.model.layers)]
    return [(Embedding, (vocab, cfg.model.dim, tp)), *blocks, (Head, (cfg, vocab, tp))]


class Transformer(nn.Sequential):
    """The whole model on one pipeline stage: tokens [n] -> logits [n, vocab/tp]. Its layers are named 0, 1, 2, ..."""

    def __init__(self, cfg: Config, vocab: int, mesh: Mesh):
        super().__init__(*(cls(*args) for cls, args in layers(cfg, vocab, mesh)))
        if cfg.model.tie_embeddings:
            tied.tie(self[0], self[-1])

    def forward(self, tokens: Tensor, documents: Documents) -> Tensor:
        x = tokens
        for layer in self:
            x = layer(x, documents)
        return x
