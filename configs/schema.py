"""Every option of a run, typed, and every rule between them. Standard library only.

Hydra composes the YAML groups beside this file into `Config`; `check` then applies the rules before anything is built.
A field without a default has to come from a group or from the command line.
"""

import math
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from configs.errors import ConfigError


class Kind(Enum):
    """The attention of a model."""

    full = "full"
    nsa = "nsa"


class Twin(Enum):
    """full: the run that the other options describe, but with full attention, and "-full" behind its run.dir."""

    full = "full"


class Branch(Enum):
    """The three branches of NSA (arXiv 2502.11089, Eq. 5)."""

    cmp = "cmp"
    slc = "slc"
    win = "win"


class Compression(Enum):
    """How a block of tokens becomes one: the learnable MLP of the paper, or the mean."""

    mlp = "mlp"
    mean = "mean"


class Backend(Enum):
    """What computes NSA; auto takes Triton where its kernels can run."""

    auto = "auto"
    triton = "triton"
    torch = "torch"


class Precision(Enum):
    """bf16: bf16 compute, fp32 master weights and gradient accumulation. fp32: everything."""

    bf16 = "bf16"
    fp32 = "fp32"


class Recompute(Enum):
    """What is computed again in backward instead of kept: nothing, or each block whole."""

    none = "none"
    full = "full"


class LongDocuments(Enum):
    """carry: documents lie one after the other, and what a row has no room for goes on in the next one. cut: those that
    fit into a row stay whole, longer ones are cut at its length; the few that are left over fill the gaps.
    """

    carry = "carry"
    cut = "cut"


class OnBadShard(Enum):
    """stop: the run ends with a line that names shard and sample. skip: rows of it are empty, counted and logged."""

    stop = "stop"
    skip = "skip"


class OnSpike(Enum):
    """keep: a step whose loss is a spike is counted. skip: and its update is left out."""

    keep = "keep"
    skip = "skip"


class Resume(Enum):
    """auto: continue if there is something to continue; must: fail if there is not; never: fail if there is."""

    auto = "auto"
    must = "must"
    never = "never"


class WandbMode(Enum):
    """auto: online where the user is logged in, offline elsewhere."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True)
class Model:
    """Sizes of the transformer."""

    name: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    qk_dim: int  # width of one query or key head
    v_dim: int  # width of one value head
    mlp_dim: int
    vocab_size: Optional[int] = None  # null: the data set's, rounded up to a multiple of 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02


@dataclass(kw_only=True)
class Attention:
    """Full attention, or NSA with the letters of the paper."""

    kind: Kind = Kind.nsa
    backend: Backend = Backend.auto
    branches: list[Branch] = field(default_factory=lambda: list(Branch))
    compression: Compression = Compression.mlp
    phi_hidden: Optional[int] = None  # hidden width of the compression MLP; null: the head's
    shared_kv: bool = False  # one key and value projection for all branches (the paper has one each)
    l: int = 32  # tokens of a compression block
    d: int = 16  # stride between compression blocks
    l_slc: int = 64  # tokens of a selection block (l' in the paper)
    n: int = 16  # blocks selected for a query, the forced ones included
    initial: int = 1  # forced blocks at the start of the document
    local: int = 2  # forced blocks that end with the query's own
    w: int = 512  # window in tokens, the query's own included


@dataclass(kw_only=True)
class Parallel:
    """How the model is cut; data parallelism takes the remaining processes."""

    tp: int = 1
    pp: int = 1
    zero: int = 1
    sequence: bool = False  # Megatron sequence parallelism: activations between the tp regions are split over tokens
    recompute: Recompute = Recompute.none
    timeout: int = 600  # seconds until a collective that waits for a lost rank fails


@dataclass(kw_only=True)
class Data:
    """Prepared shards (python -m data.prepare) and how rows are made of them."""

    path: Optional[str] = None  # a directory, or an http(s):// or s3:// address; or else:
    mix: Any = None  # several of them with weights, {DIR_A: 0.7, DIR_B: 0.3}; the colon of an address is written \:
    seq_len: int = 1024
    long_documents: LongDocuments = LongDocuments.carry
    verify: bool = False  # compare each shard's whole hash when it is opened; pages are always checked at first use
    on_bad_shard: OnBadShard = OnBadShard.stop
    read_ahead: int = 1  # steps made ready by a thread while the device works; the order does not depend on it
    cache_dir: str = "~/.cache/sparsetron"  # of shards from servers, shared by the processes of a node
    cache_gib: float = 64.0  # kept there at most; the least recently opened go first
    timeout: float = 120.0  # seconds of trying until a part of a remote shard is given up


@dataclass(kw_only=True)
class Optim:
    """AdamW with warm-up and cosine decay."""

    lr: float = 3e-4
    min_lr: float = 3e-5
    warmup: int = 100  # steps
    weight_decay: float = 0.1  # on matrices; norms, biases and position encodings have none
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest global gradient norm


@dataclass(kw_only=True)
class Train:
    """The loop."""

    steps: int = 1000
    global_batch: int = 16  # rows of an optimizer step, over all data-parallel ranks
    micro_batch: int = 2  # rows of one forward pass on one rank
    precision: Precision = Precision.bf16
    start_from: Optional[str] = None  # a model that launch.export wrote: the first weights of a new run
    log_every: int = 1
    health_every: int = 100  # steps between measurements of sparse attention (nsa/health.py); 0: never
    eval_every: int = 0  # steps; 0: only after the last one
    eval_batches: int = 4  # global batches of held-out rows


@dataclass(kw_only=True)
class Checkpoint:
    """When to save and how many to keep."""

    every: int = 0  # steps; 0: only after the last one
    keep: int = 2


@dataclass(kw_only=True)
class Guard:
    """Updates left out because their numbers went wrong (always where they are no numbers); how many are too many."""

    on_spike: OnSpike = OnSpike.keep
    spike: float = 6.0  # deviations above the median of the last losses that make a spike
    window: int = 128  # accepted steps that median and deviation are of; no spikes before there are so many
    in_a_row: int = 3  # so many updates left out one after the other end the run
    share: float = 0.001  # and so do more than this share of train.steps in all (or than in_a_row, if that is more)


@dataclass(kw_only=True)
class Run:
    """Where the run lives. metrics.jsonl, config.yaml, checkpoints/ and wandb/ are below `dir`."""

    dir: str
    twin: Optional[str] = None  # run directory of the full-attention twin: the baseline of speedup_vs_full


@dataclass(kw_only=True)
class Wandb:
    """The dashboard; metrics.jsonl holds the same numbers."""

    mode: WandbMode = WandbMode.auto
    project: str = "sparsetron"
    timeout: float = 15.0  # seconds to wait for a server before the run goes on without one


@dataclass(kw_only=True)
class Profile:
    """A torch trace (chrome://tracing, Perfetto) of some steps, of each rank, in traces/ of the run."""

    steps: Optional[list[int]] = None  # [first, last]; null: none


@dataclass(kw_only=True)
class Config:
    """One run."""

    model: Model
    attention: Attention = field(default_factory=Attention)
    parallel: Parallel = field(default_factory=Parallel)
    data: Data
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guard: Guard = field(default_factory=Guard)
    run: Run
    profile: Profile = field(default_factory=Profile)
    wandb: Wandb = field(default_factory=Wandb)
    resume: Resume = Resume.auto
    seed: int = 0
    twin: Optional[Twin] = None
    experiment: Optional[str] = None  # the name under which runs are compared


def check(cfg: Config, world: int) -> None:
    """Apply every rule to a run on `world` processes. Raises ConfigError with the first one that is broken."""
    _check_ranges(cfg)
    _check_profile(cfg.profile)
    _check_paths(cfg)
    _check_model(cfg)
    if cfg.attention.kind is Kind.nsa:
        _check_nsa(cfg.attention)
    _check_layout(cfg, world)


REMOTE = ("http", "https", "s3")


def scheme(path: str) -> Optional[str]:
    """Of an address such as http://...; None for a path of this machine. `pipe:` is one too, and never allowed."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)|(pipe):", path)
    return (found.group(1) or found.group(3)).lower() if found else None


def sources(data: Data) -> dict[str, float]:
    """The data sets of a run with their weights."""
    return dict(data.mix or {}) or {data.path or "": 1.0}


def data_parallel(cfg: Config, world: int) -> int:
    """Number of data-parallel replicas among `world` processes."""
    return world // (cfg.parallel.tp * cfg.parallel.pp)


def micro_batches(cfg: Config, world: int) -> int:
    """Forward passes of one rank in an optimizer step."""
    return cfg.train.global_batch // (cfg.train.micro_batch * data_parallel(cfg, world))


def _require(ok: bool, key: str, value: object, why: str, fix: str) -> None:
    if not ok:
        shown = value.value if isinstance(value, Enum) else value
        raise ConfigError("config", f"{key}={shown}", why, fix)


_AT_LEAST_ONE = """
    model.layers model.dim model.heads model.kv_heads model.qk_dim model.v_dim model.mlp_dim
    attention.l attention.d attention.l_slc attention.n attention.local attention.w
    parallel.tp parallel.pp parallel.timeout data.seq_len
    train.global_batch train.micro_batch train.log_every train.eval_batches checkpoint.keep
    guard.window guard.in_a_row
""".split()
_AT_LEAST_ZERO = """
    train.health_every
    attention.initial optim.lr optim.min_lr optim.warmup optim.weight_decay
    train.steps train.eval_every checkpoint.every seed data.read_ahead guard.share
""".split()
_ABOVE_ZERO = """
    model.rope_theta model.norm_eps model.init_std optim.eps optim.clip
    wandb.timeout data.cache_gib data.timeout guard.spike
""".split()


def _get(cfg: Config, key: str) -> Any:
    node: Any = cfg
    for part in key.split("."):
        node = getattr(node, part)
    return node


def _check_ranges(cfg: Config) -> None:
    for key in _AT_LEAST_ONE:
        _require(_get(cfg, key) >= 1, key, _get(cfg, key), "out of range", "give at least 1")
    for key in _AT_LEAST_ZERO:
        _require(_get(cfg, key) >= 0, key, _get(cfg, key), "out of range", "give at least 0")
    for key in _ABOVE_ZERO:
        _require(_get(cfg, key) > 0, key, _get(cfg, key), "out of range", "give a number above 0")
    for key in ("optim.beta1", "optim.beta2"):
        _require(0 <= _get(cfg, key) < 1, key, _get(cfg, key), "out of range", "give a number from 0 to below 1")
    for key in ("model.vocab_size", "attention.phi_hidden"):
        value = _get(cfg, key)
        _require(value is None or value >= 1, key, value, "out of range", "give at least 1, or null")


def _check_profile(profile: Profile) -> None:
    s = profile.steps
    ok = s is None or (len(s) == 2 and 1 <= s[0] <= s[1])
    _require(ok, "profile.steps", s, "no span of steps", "give [first, last], counted from 1, or null")


def _check_paths(cfg: Config) -> None:
    data = cfg.data
    if data.mix is not None:  # omegaconf cannot put a typed dictionary where there was none
        weights = list(data.mix.values()) if isinstance(data.mix, dict) else []
        plain = bool(weights) and {type(w) for w in weights} <= {int, float}
        _require(
            plain,
            "data.mix",
            data.mix,
            "no weights by data set",
            r"give {DIR_A: 0.7, DIR_B: 0.3}, and http\://... for an address",
        )
        _require(data.path is None, "data.path", data.path, "given beside data.mix", "give one of them")
    else:
        _require(data.path is not None, "data.path", data.path, "has no value", "give data.path=DIR, or data.mix")
    for path, weight in sources(data).items():
        _require(0 < weight < math.inf, f"data.mix.{path}", weight, "no weight", "give a number above 0")
        _check_path(cfg, "data.mix" if data.mix else "data.path", str(path))
    _check_path(cfg, "run.dir", cfg.run.dir)
    _require(scheme(cfg.run.dir) is None, "run.dir", cfg.run.dir, "not on this machine", "give a directory")


def _check_path(cfg: Config, key: str, value: str) -> None:
    _require(bool(value.strip()), key, value, "empty", "give a directory")
    kind = scheme(value)
    allowed = kind is None or kind in REMOTE
    _require(allowed, key, value, f"{kind}: is not allowed", f"give a directory, or one of {', '.join(REMOTE)}")
    if kind is None:
        _require("=" not in value, key, value, "has a '=' in it", "choose a path without '=' (it breaks overrides)")
    if key != "run.dir":
        same = kind is None and os.path.abspath(value) == os.path.abspath(cfg.run.dir)
        _require(not same, "run.dir", cfg.run.dir, f"is also {key}", "give the run a directory of its own")


def _check_model(cfg: Config) -> None:
    m, tp = cfg.model, cfg.parallel.tp
    _require(
        m.heads % m.kv_heads == 0, "model.heads", m.heads,
        f"not divisible by model.kv_heads={m.kv_heads}", f"give a multiple of {m.kv_heads}",
    )  # fmt: skip
    _require(m.qk_dim % 2 == 0, "model.qk_dim", m.qk_dim, "odd, but RoPE turns pairs", "give an even number")
    if m.vocab_size is not None:
        _require(
            m.vocab_size % tp == 0, "model.vocab_size", m.vocab_size,
            f"not divisible by parallel.tp={tp}", f"give a multiple of {tp}, or null",
        )  # fmt: skip


def _check_nsa(a: Attention) -> None:
    _require(
        a.l % a.d == 0, "attention.l", a.l,
        f"not divisible by the stride attention.d={a.d}", f"give a multiple of {a.d} (Eq. 9)",
    )  # fmt: skip
    _require(
        a.l_slc % a.d == 0, "attention.l_slc", a.l_slc,
        f"not divisible by the stride attention.d={a.d}", f"give a multiple of {a.d} (Eq. 9)",
    )  # fmt: skip
    _require(
        a.l <= a.l_slc, "attention.l", a.l,
        f"larger than attention.l_slc={a.l_slc}", f"give at most {a.l_slc} (Eq. 9)",
    )  # fmt: skip
    _require(
        a.initial + a.local <= a.n, "attention.n", a.n,
        f"smaller than the forced blocks attention.initial={a.initial} + attention.local={a.local}",
        f"give at least {a.initial + a.local}",
    )  # fmt: skip
    names = [b.value for b in a.branches]
    _require(bool(names), "attention.branches", names, "no branch left", "give at least one of cmp, slc, win")
    _require(
        len(set(names)) == len(names), "attention.branches", names,
        "names a branch twice", "give each of cmp, slc, win at most once",
    )  # fmt: skip
    _require(
        Branch.slc not in a.branches or Branch.cmp in a.branches or a.compression is Compression.mean,
        "attention.compression", a.compression,
        "selection without the cmp branch would score blocks with an MLP that gets no gradient",
        "give compression=mean or add cmp to attention.branches",
    )  # fmt: skip


def _check_layout(cfg: Config, world: int) -> None:
    p, m, t = cfg.parallel, cfg.model, cfg.train
    _require(
        world % (p.tp * p.pp) == 0, "parallel.tp*pp", p.tp * p.pp,
        f"does not divide the {world} processes", "start a multiple of tp*pp processes, or change tp or pp",
    )  # fmt: skip
    for key in ("model.kv_heads", "model.heads", "model.mlp_dim"):
        value = _get(cfg, key)
        _require(
            value % p.tp == 0, key, value,
            f"not divisible by parallel.tp={p.tp}", f"give a multiple of {p.tp}, or a tp that divides {value}",
        )  # fmt: skip
    _require(
        m.layers >= p.pp, "model.layers", m.layers,
        f"fewer than parallel.pp={p.pp} stages", "give each stage at least one layer",
    )  # fmt: skip
    _require(
        p.zero in (1, 2, 3), "parallel.zero", p.zero,
        "not a supported ZeRO stage (0 reports wrong gradient norms in DeepSpeed 0.19.8)", "give 1, 2 or 3",
    )  # fmt: skip
    _require(
        p.pp == 1 or p.zero == 1, "parallel.zero", p.zero,
        f"DeepSpeed cannot pipeline (parallel.pp={p.pp}) with ZeRO 2 or 3", "give zero=1 or pp=1",
    )  # fmt: skip
    _require(
        not p.sequence or (t.micro_batch * cfg.data.seq_len) % p.tp == 0, "data.seq_len", cfg.data.seq_len,
        f"a micro-batch of {t.micro_batch * cfg.data.seq_len} tokens does not divide by parallel.tp={p.tp}",
        "change data.seq_len or train.micro_batch, or give parallel.sequence=false",
    )  # fmt: skip
    dp = data_parallel(cfg, world)
    _require(
        t.global_batch % (t.micro_batch * dp) == 0, "train.global_batch", t.global_batch,
        f"not divisible by train.micro_batch={t.micro_batch} x {dp} data-parallel ranks",
        f"give a multiple of {t.micro_batch * dp}",
    )  # fmt: skip
    _require(
        cfg.optim.min_lr <= cfg.optim.lr, "optim.min_lr", cfg.optim.min_lr,
        f"larger than optim.lr={cfg.optim.lr}", f"give at most {cfg.optim.lr}",
    )  # fmt: skip
