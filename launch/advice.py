"""Which overrides make a run fit: found by trying them."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from configs.errors import ConfigError
from configs.rules import check_sizes
from configs.schema import Config, Recompute

Change = tuple[str, Any]  # an option and its value
Need = Callable[[Config], float]  # GiB


def advise(cfg: Config, world: int, most: float, need: Need) -> str:
    """The two overrides that help most, each alone if one is enough, else together, with the GiB that remain."""
    options = list(_options(cfg, world))
    gib, text = _search(cfg, world, options, most, need)
    if gib > most:
        no = f"{text}, and more GPUs or a smaller model: that is still too much"
        text = next(_with_shorter_rows(cfg, world, options, most, need), no)
    return f"give {text}"


def _search(cfg: Config, world: int, options: list[list[Change]], most: float, need: Need) -> tuple[float, str]:
    """GiB with the best of these, and the two in words: alternatives if each helps enough, else a pair."""
    best = [_best(cfg, world, changes, most, need) for changes in options]
    alone = sorted((gib, [change]) for change, gib in filter(None, best))
    if alone and alone[0][0] <= most:
        return alone[0][0], ", or ".join(_text(*one, most) for one in alone[:2])
    pairs = itertools.combinations(options, 2)
    both = [list(pair) for a, b in pairs for pair in itertools.product(a, b)]
    tried = [(gib, changes) for changes in both if (gib := _try(cfg, world, changes, need)) is not None]
    gib, changes = min([*tried, *alone], key=lambda x: x[0], default=(math.inf, []))
    return gib, _text(gib, changes, math.inf) if changes else "no override, for none helps"


def _options(cfg: Config, world: int) -> Iterator[list[Change]]:
    """Values of an option that save memory, the mildest first; those that train the same model on the same batches."""
    p, rows = cfg.parallel, cfg.train.micro_batch
    stronger = list(Recompute)[list(Recompute).index(p.recompute) + 1 :]
    yield [("parallel.recompute", value) for value in stronger]
    yield [("parallel.zero", stage) for stage in (2, 3) if stage > p.zero]
    yield [("train.micro_batch", rows // k) for k in _powers(rows) if rows % k == 0]
    yield [("parallel.sequence", True)] * (p.tp > 1 and not p.sequence)
    yield [("parallel.tp", p.tp * k) for k in _powers(world)]
    yield [("parallel.pp", p.pp * k) for k in _powers(world)]


def _with_shorter_rows(cfg: Config, world: int, options: list[list[Change]], most: float, need: Need) -> Iterator[str]:
    """The last thing to change, as it is another training run, and as little as fits: alone, or with one of these."""
    length = cfg.data.seq_len
    for shorter in [("data.seq_len", length // k) for k in _powers(length) if length // k >= 1024]:
        for changes in [[shorter], *([shorter, change] for values in options for change in values)]:
            gib = _try(cfg, world, changes, need)
            if gib is not None and gib <= most:
                yield _text(gib, changes, most)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(1, most.bit_length())]


def _best(cfg: Config, world: int, changes: list[Change], most: float, need: Need) -> tuple[Change, float] | None:
    """The first of these that is enough, or the one that helps most, if it helps."""
    tried = [(change, gib) for change in changes if (gib := _try(cfg, world, [change], need)) is not None]
    enough = [t for t in tried if t[1] <= most]
    best = enough[:1] or sorted(tried, key=lambda t: t[1])[:1]
    return best[0] if best and best[0][1] < need(cfg) else None


def _try(cfg: Config, world: int, changes: list[Change], need: Need) -> float | None:
    """GiB with these; None if that is no run."""
    for key, value in changes:
        group, field = key.split(".")
        cfg = replace(cfg, **{group: replace(getattr(cfg, group), **{field: value})})
    try:
        check_sizes(cfg, world)
        return need(cfg)
    except ConfigError:
        return None


def _text(gib: float, changes: list[Change], most: float) -> str:
    shown = [(key, value.value if isinstance(value, Recompute) else str(value).lower()) for key, value in changes]
    enough = "" if gib <= most else ", not enough alone"
    return f"{' and '.join(f'{key}={value}' for key, value in shown)} ({gib:,.1f} GiB{enough})"
