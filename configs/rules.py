"""Every rule between the options of configs.schema, applied before anything is built. Standard library only."""

import math
import os
from enum import Enum
from typing import Any

from configs.errors import ConfigError
from configs.kernels import misfit_of
from configs.schema import (
    REMOTE,
    Attention,
    Backend,
    Branch,
    Compression,
    Config,
    Kind,
    Profile,
    data_parallel,
    duration,
    scheme,
    sources,
)


def check(cfg: Config, world: int) -> None:
    """Apply every rule to a run on `world` processes. Raises ConfigError with the first one that is broken."""
    _check_paths(cfg)
    check_sizes(cfg, world)


def check_sizes(cfg: Config, world: int) -> None:
    """Apply the rules that do not depend on where a run reads and writes."""
    _check_ranges(cfg)
    _check_profile(cfg.profile, cfg.train.steps)
    _check_skip(cfg.data.skip)
    _check_time_limit(cfg.run.time_limit)
    check_project(cfg.wandb.project)
    _check_model(cfg)
    if cfg.attention.kind is Kind.nsa:
        check_nsa(cfg.attention)
        _check_scores(cfg.attention)
        _check_kernels(cfg)
    _check_layout(cfg, world)


def check_project(name: str) -> None:
    """Whether W&B takes it as the name of a project. Raises ConfigError."""
    ok = bool(name.strip()) and not set(name) & set("/\\#?%:")
    _require(ok, "wandb.project", name, "no name of a W&B project", "give one without / \\ # ? % :")


def _require(ok: bool, key: str, value: object, why: str, fix: str) -> None:
    if not ok:
        shown = value.value if isinstance(value, Enum) else value
        raise ConfigError("config", f"{key}={shown}", why, fix)


_AT_LEAST_ONE = """
    model.layers model.dim model.heads model.kv_heads model.qk_dim model.v_dim model.mlp_dim
    parallel.tp parallel.pp parallel.timeout data.seq_len
    train.global_batch train.micro_batch train.log_every train.eval_batches checkpoint.keep
    guard.window guard.in_a_row
""".split()
_AT_LEAST_ZERO = """
    train.health_every
    optim.lr optim.min_lr optim.warmup optim.weight_decay
    train.steps train.eval_every checkpoint.every seed data.read_ahead guard.share guard.rollbacks run.calibrate
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
    for key in (*_AT_LEAST_ZERO, *_ABOVE_ZERO):
        _require(_get(cfg, key) < math.inf, key, _get(cfg, key), "out of range", "give a finite number")
    for key in ("optim.beta1", "optim.beta2"):
        _require(0 <= _get(cfg, key) < 1, key, _get(cfg, key), "out of range", "give a number from 0 to below 1")
    for key in ("model.vocab_size", "attention.phi_hidden", "data.random"):
        value = _get(cfg, key)
        _require(value is None or value >= 1, key, value, "out of range", "give at least 1, or null")


def _check_skip(skip: list[Any]) -> None:
    for span in skip:
        ok = isinstance(span, list) and [type(end) for end in span] == [int, int] and 1 <= span[0] <= span[1]
        _require(ok, "data.skip", skip, "no spans of batches", "give [[first, last], ...], counted from 1")


def _check_time_limit(limit: str | None) -> None:
    try:
        ok = limit is None or duration(limit) > 0
    except ValueError:
        ok = False
    _require(ok, "run.time_limit", limit, "not a time", "give seconds above 0, or hours:minutes:seconds")


def _check_profile(profile: Profile, last: int) -> None:
    s = profile.steps
    ok = s is None or (len(s) == 2 and 1 <= s[0] <= s[1])
    _require(ok, "profile.steps", s, "no span of steps", "give [first, last], counted from 1, or null")
    _require(s is None or s[0] <= last, "profile.steps", s, f"begins after train.steps={last}", "give earlier ones")


def _check_paths(cfg: Config) -> None:
    data = cfg.data
    _check_path(cfg, "run.dir", cfg.run.dir)
    _require(scheme(cfg.run.dir) is None, "run.dir", cfg.run.dir, "not on this machine", "give a directory")
    if data.random is not None:
        given = next((key for key in ("path", "mix") if getattr(data, key) is not None), None)
        _require(given is None, "data.random", data.random, f"given beside data.{given}", "give one of them")
        return
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
        fix = "give data.path=DIR, data.mix or data.random"
        _require(data.path is not None, "data.path", data.path, "has no value", fix)
    for path, weight in sources(data).items():
        _require(0 < weight < math.inf, f"data.mix.{path}", weight, "no weight", "give a number above 0")
        _check_path(cfg, "data.mix" if data.mix else "data.path", str(path))


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


def check_nsa(a: Attention) -> None:
    """Apply the rules that sparse attention itself depends on. Raises ConfigError with the first one that is broken."""
    for name in ("l", "d", "l_slc", "n", "local", "w", "initial"):
        least = 0 if name == "initial" else 1
        _require(
            getattr(a, name) >= least, f"attention.{name}", getattr(a, name), "out of range", f"give at least {least}"
        )
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


def _check_scores(a: Attention) -> None:
    _require(
        Branch.slc not in a.branches or Branch.cmp in a.branches or a.compression is Compression.mean,
        "attention.compression", a.compression,
        "selection without the cmp branch would score blocks with an MLP that gets no gradient",
        "give compression=mean or add cmp to attention.branches",
    )  # fmt: skip


def _check_kernels(cfg: Config) -> None:
    why = misfit_of(cfg)
    ok = cfg.attention.backend is not Backend.triton or why is None
    _require(ok, "attention.backend", cfg.attention.backend, str(why), "give torch or auto")


def _check_layout(cfg: Config, world: int) -> None:
    p, m, t = cfg.parallel, cfg.model, cfg.train
    _require(world >= 1, "processes", world, "a run has at least one", "give a positive number of nodes and processes")
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
