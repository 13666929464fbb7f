"""Every option of a run, typed. Standard library only.

Hydra composes the YAML groups beside this file into `Config`; `configs.rules.check` then applies the rules between
them, before anything is built. A field without a default has to come from a group or from the command line.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional


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
    """What is computed again in backward instead of kept: nothing, what follows attention in a block, or each block."""

    none = "none"
    mlp = "mlp"
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
    """keep: a step whose loss is a spike is counted. skip: and its update is left out. rollback: and where
    guard.in_a_row of them (or of what is no number) would end the run, it goes back to the newest checkpoint before
    them, and passes over all batches since.
    """

    keep = "keep"
    skip = "skip"
    rollback = "rollback"


class OnSaveError(Enum):
    """stop: a checkpoint that cannot be written ends the run. skip: it is logged, and the next one tried."""

    stop = "stop"
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
    tie_embeddings: bool = False  # the head has the embedding's weight


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
    compile: Optional[bool] = None  # fuse what lies around attention (torch.compile); null: on a GPU
    timeout: int = 600  # seconds a step may take until the run is ended as hung; ten times as long what is no step


@dataclass(kw_only=True)
class Data:
    """Prepared shards (python -m data.prepare) and how rows are made of them."""

    path: Optional[str] = None  # a directory, or an http(s):// or s3:// address; or else:
    mix: Any = None  # several of them with weights, {DIR_A: 0.7, DIR_B: 0.3}; the colon of an address is written \:
    random: Optional[int] = None  # or no data set, but random tokens below this number, one document a row
    seq_len: int = 1024
    long_documents: LongDocuments = LongDocuments.carry
    verify: bool = False  # compare each shard's whole hash when it is opened; pages are always checked at first use
    on_bad_shard: OnBadShard = OnBadShard.stop
    # [[first, last], ...]: global batches that are passed over, counted from 1 in the order of the data (`batch` in
    # metrics.jsonl), over stages of other seq_len too; each step takes the next one that is left
    skip: list[Any] = field(default_factory=list)  # omegaconf names no key where a list within a list is none
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
    last: bool = True  # also after the last step, or when the run is asked to stop
    keep: int = 2
    asynchronous: bool = True  # written while training goes on, from a copy in host memory (12 bytes a parameter)
    on_error: OnSaveError = OnSaveError.stop  # the last checkpoint of a run has to be written in any case


@dataclass(kw_only=True)
class Guard:
    """Updates left out because their numbers went wrong (always where they are no numbers); how many are too many."""

    on_spike: OnSpike = OnSpike.keep
    spike: float = 6.0  # deviations above the median of the last losses that make a spike
    window: int = 128  # accepted steps that median and deviation are of; no spikes before there are so many
    rollbacks: int = 3  # so many at most under on_spike=rollback, in the whole life of a run
    in_a_row: int = 3  # so many updates left out one after the other end the run
    share: float = 0.001  # and so do more than this share of train.steps in all (or than in_a_row, if that is more)


@dataclass(kw_only=True)
class Run:
    """Where the run lives. metrics.jsonl, config.yaml, checkpoints/ and wandb/ are below `dir`."""

    dir: str
    time_limit: Optional[str] = None  # seconds or h:m:s since the start: it then has saved and left with code 75
    twin: Optional[str] = None  # run directory of the full-attention twin: the baseline of speedup_vs_full
    calibrate: int = 8  # steps of full attention that measure one before an NSA run that has no twin, 3 to warm up


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
    syncs: bool = False  # also tell which lines of code wait for the GPU in steps that log nothing, and how often


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
    deterministic: bool = False  # the same bits each time on GPUs of one kind, at some cost in speed
    twin: Optional[Twin] = None
    experiment: Optional[str] = None  # the name under which runs are compared


REMOTE = ("http", "https", "s3")


def scheme(path: str) -> Optional[str]:
    """Of an address such as http://...; None for a path of this machine. `pipe:` is one too, and never allowed."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)|(pipe):", path)
    return (found.group(1) or found.group(3)).lower() if found else None


def duration(text: str) -> float:
    """Seconds of `90`, `1:30` (minutes) or `1:00:00` (hours). Raises ValueError."""
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d+)?", text):
        raise ValueError(f"{text} is no duration")
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def sources(data: Data) -> dict[str, float]:
    """The data sets of a run with their weights."""
    return dict(data.mix or {}) or {data.path or "": 1.0}


def data_parallel(cfg: Config, world: int) -> int:
    """Number of data-parallel replicas among `world` processes."""
    return world // (cfg.parallel.tp * cfg.parallel.pp)


def micro_batches(cfg: Config, world: int) -> int:
    """Forward passes of one rank in an optimizer step."""
    return cfg.train.global_batch // (cfg.train.micro_batch * data_parallel(cfg, world))
