"""How many parameters a rank holds, by part, from the configuration alone: nothing is built."""

from dataclasses import dataclass

from configs.schema import Branch, Compression, Config, Kind


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of several."""

    index: int
    of: int
    blocks: int

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def last(self) -> bool:
        return self.index == self.of - 1


def stages(cfg: Config) -> list[Stage]:
    """As parallel/pipeline.py cuts the model: equal numbers of blocks, one more in the first ones if that fails."""
    pp = cfg.parallel.pp
    whole, more = divmod(cfg.model.layers, pp)
    return [Stage(i, pp, whole + (i < more)) for i in range(pp)]


def parameters(cfg: Config, vocab: int, stage: Stage) -> dict[str, int]:
    """Of one tensor-parallel rank of a stage, by part."""
    d, tp = cfg.model.dim, cfg.parallel.tp
    return {
        "embedding": d * vocab // tp * stage.first,
        "attention": stage.blocks * _attention(cfg) // tp,
        "compression": stage.blocks * _compression(cfg),
        "MLP": stage.blocks * 3 * d * cfg.model.mlp_dim // tp,
        "norms": (2 * stage.blocks + stage.last) * d,
        "head": d * vocab // tp * (stage.last and not (cfg.model.tie_embeddings and stage.first)),
    }


def whole(cfg: Config, vocab: int) -> int:
    """Of the model."""
    d, layers = cfg.model.dim, cfg.model.layers
    block = _attention(cfg) + _compression(cfg) + 3 * d * cfg.model.mlp_dim + 2 * d
    return layers * block + d + (1 if cfg.model.tie_embeddings else 2) * d * vocab


def _attention(cfg: Config) -> int:
    """Projections and gate of one block, over all tensor-parallel ranks."""
    m, a = cfg.model, cfg.attention
    pairs, gates = (1, 0) if a.kind is Kind.full else (1 if a.shared_kv else len(a.branches), len(a.branches))
    queries, keys = m.heads * (m.qk_dim + gates), m.kv_heads * pairs * m.qk_dim
    return m.dim * (queries + keys + m.kv_heads * pairs * m.v_dim + m.heads * m.v_dim)


def _compression(cfg: Config) -> int:
    """The two compression MLPs of one block, which every tensor-parallel rank has whole."""
    m, a = cfg.model, cfg.attention
    if a.kind is Kind.full or Branch.cmp not in a.branches or a.compression is Compression.mean:
        return 0
    hidden = {width: a.phi_hidden or width for width in (m.qk_dim, m.v_dim)}
    return sum(a.l * w + hidden[w] * (a.l * w + 1) + w * (hidden[w] + 1) for w in (m.qk_dim, m.v_dim))
