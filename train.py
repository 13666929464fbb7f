"""One run: configuration, processes, data, engine, resume, loop. `python train.py --help` lists the groups.

Rank 0 alone composes the configuration and owns the run directory; the others receive the resolved text.
Exit codes are in configs/errors.py.
"""

import os
import sys
import time
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist

from configs.errors import PREEMPTED, ConfigError, DataError, RunError
from configs.rules import check
from configs.schema import Config, OnBadShard, sources
from data.loader import Batch, Loader
from data.store import Limits
from data.synthetic import RandomRows
from launch import baseline, hang, memory, rollbacks, sweep
from launch.clock import Clock, deadline
from launch.compose import compose, from_text, is_multirun
from launch.log import RunLog
from launch.meter import Meter, environment
from launch.processes import die_with_parent
from launch.profile import Trace
from launch.stop import REASONS, Stop
from launch.stragglers import Stragglers
from parallel import checkpoint, health, mesh, metrics, repeat
from parallel.comm import agree, host_gather, host_sum, together
from parallel.engine import Engine
from parallel.guard import Guard
from parallel.mesh import Mesh
from parallel.position import LossByPosition
from parallel.saver import Saver
from parallel.schedule import learning_rate


def train_step(run: "Run") -> "Step":
    """One optimizer step: the next rows of every rank, forward and backward over its micro-batches, one update."""
    if run.log:
        run.log.position(run.step, run.loader)
    with run.meter.waiting():
        batches, totals = next_batches(run, run.loader)
    lr = learning_rate(run.step, run.cfg.train.steps, run.cfg.optim)
    loss, norm = run.engine.train_step(batches, totals.targets, lr, run.guard)
    run.step += 1
    run.tokens += run.cfg.train.global_batch * run.cfg.data.seq_len
    run.padding += totals.padding
    return Step(loss, norm, lr, totals)


def train(run: "Run") -> tuple[int, str]:
    """Steps until the last one, or until somebody asks to stop. Returns the exit code and the reason."""
    cfg, meter, stop = run.cfg, run.meter, None
    trace = Trace(cfg, run.mesh.rank)
    meter.restart()
    while run.step < cfg.train.steps and stop is None:
        looks = due(run.step + 1, cfg.train.health_every)
        watch = health.Watch(run.engine.deepspeed.module, cfg.attention) if looks else None
        if due(run.step + 1, cfg.train.log_every):
            run.engine.stopwatch.watch()
        run.clock.enter("step", run.step + 1)
        trace.before(run.step + 1)
        step = train_step(run)
        meter.count(step.totals.flops, step.totals.dense_flops)
        stop = step.totals.stop
        last = run.step == cfg.train.steps or stop is not None
        if run.guard.why:
            run.clock.left_out()
            write_skipped(run, step)
        elif due(run.step, cfg.train.log_every) or last:
            write_step(run, step)
        meter.pause()
        run.clock.enter("evaluate", run.step)
        trace.after(run.step, last)
        if watch:
            write_health(run, watch)
        if due(run.step, cfg.train.eval_every) or (last and not (stop and stop[0] == PREEMPTED)):
            evaluate(run)
        run.clock.enter("save", run.step)
        if run.guard.spent:
            rollbacks.go_back(run, {"loss": float(step.loss), "norm": float(step.norm), "lr": step.lr})
        elif due(run.step, cfg.checkpoint.every) or (last and cfg.checkpoint.last):
            run.saver.save(run.step, run.state())
        meter.resume()
    run.saver.wait(last=True)
    return stop or (0, "done")


def due(step: int, every: int) -> bool:
    """Whether something that happens each `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


@dataclass
class Run:
    """What the loop works on."""

    cfg: Config
    mesh: Mesh
    stop: Stop
    vocab: int
    loader: Loader | RandomRows
    held_out: Optional[Loader]  # None where no documents were held out
    engine: Engine
    meter: Meter
    guard: Guard
    clock: Clock
    stragglers: Stragglers
    saver: Optional[Saver] = None
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    log: Optional[RunLog] = None  # on rank 0
    step: int = 0
    tokens: int = 0  # positions of rows, padding included
    padding: int = 0
    wandb_id: str = ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights and optimizer. Nothing is drawn at random after the start."""
        counters = {"step": self.step, "tokens": self.tokens, "padding": self.padding, "wandb_id": self.wandb_id}
        parts = {"data": self.loader.state_dict(), "guard": self.guard.state_dict(), "clock": self.clock.state_dict()}
        return {**self.identity(), **counters, **parts}

    def identity(self) -> dict[str, Any]:
        """The part of it that a checkpoint is judged by."""
        return describe(self.cfg, self.mesh, self.vocab)

    def restore(self, path: str, state: dict[str, Any]) -> None:
        """Be where a checkpoint was made."""
        checkpoint.load(path, self.engine)
        self.loader.load_state_dict(state["data"])
        self.step, self.tokens, self.padding = state["step"], state["tokens"], state["padding"]
        self.wandb_id = state["wandb_id"]
        self.guard.load_state_dict(state["guard"])
        self.clock.load_state_dict(state["clock"])


@dataclass(frozen=True)
class Totals:
    """Of one global batch, over all ranks."""

    targets: int  # labels that count
    flops: int  # of the model, forward and backward
    dense_flops: int  # that its full-attention twin would need
    padding: int  # tokens of no document
    stop: Optional[tuple[int, str]]  # exit code and reason, if some rank was asked to stop
    retries: int  # requests for data that were made again
    before: float  # seconds of the step in which this rank waited for no other


@dataclass(frozen=True)
class Step:
    """What an optimizer step gave; `loss` and `norm` are device scalars."""

    loss: torch.Tensor
    norm: torch.Tensor
    lr: float
    totals: Totals


def next_batches(run: Run, loader: Loader | RandomRows) -> tuple[list[Batch], Totals]:
    """This rank's micro-batches, and sums over all ranks. One rank's DataError is raised on all of them."""
    try:
        batches, error = loader.next_step(), None
    except DataError as e:
        batches, error = [], e
    lengths = [n for b in batches for n in b.cu_seqlens.diff().tolist()]
    targets = sum(int((b.labels >= 0).sum()) for b in batches)
    flops = metrics.flops(run.cfg, run.vocab, lengths).total
    dense = metrics.dense_equivalent(run.cfg, run.vocab, lengths).total
    padding = sum(b.padding for b in batches)
    asked = run.stop.asked(Path(run.cfg.run.dir)) or run.clock.asked()
    counts = [targets, flops, dense, padding]
    facts = [error is not None, bool(loader.damaged), run.saver.finished, loader.retries]
    before = time.monotonic() - run.clock.since
    sums = host_sum([*facts, *(asked == reason for reason in REASONS), *counts], run.mesh)
    if sums[0]:
        raise next(e for e in host_gather(error, run.mesh) if e)
    if sums[2] == run.mesh.world:
        run.saver.wait()
    stop = next((REASONS[reason] for reason, count in zip(REASONS, sums[4:]) if count), None)
    same = run.mesh.tp.size * run.mesh.pp.size  # this many ranks hold each row
    totals = Totals(*(s // same for s in sums[4 + len(REASONS) :]), stop, sums[3], before)
    return skip_damaged(run, loader, batches, totals) if sums[1] else (batches, totals)


def skip_damaged(run: Run, loader: Loader, batches: list[Batch], totals: Totals) -> tuple[list[Batch], Totals]:
    """Empty, on every rank that holds them, the rows that some rank could not read, and say so."""
    found = {k: e for damaged in host_gather(loader.damaged, run.mesh) for k, e in damaged.items()}
    if len(found) == run.cfg.train.global_batch:
        raise next(iter(found.values()))
    batches = loader.blank(batches, set(found))
    sums = [sum(int((b.labels >= 0).sum()) for b in batches), sum(b.padding for b in batches)]
    targets, padding = (s // (run.mesh.tp.size * run.mesh.pp.size) for s in host_sum(sums, run.mesh))
    if run.log:
        for row, error in sorted(found.items()):
            run.log.say(f"skips row {row} of the {loader.split} data, {loader.skipped} so far: {error}")
    return batches, replace(totals, targets=targets, padding=padding)


def write_step(run: Run, step: Step) -> None:
    """Log a step, which waits for the device."""
    measured, parts = run.meter.read(), run.engine.stopwatch.read()
    measured |= run.stragglers.look(step.totals.before, parts, measured["step_s"])
    if run.log:
        values = {"step": run.step, "tokens": run.tokens, "loss": float(step.loss), "grad_norm": float(step.norm)}
        values |= {"lr": step.lr, "batch": run.loader.batch, "padding": run.padding, "rows_skipped": run.loader.skipped}
        values |= {"updates_skipped": run.guard.skipped, "loss_spikes": run.guard.spikes}
        values |= {"goodput": run.clock.goodput(), "data/retries": step.totals.retries}
        run.log.step({**values, **measured, **parts})
        if run.stragglers.news:
            run.log.say(run.stragglers.news)


def write_skipped(run: Run, step: Step) -> None:
    """Log a step whose update was left out, under other names: its loss is in no statistic."""
    if run.log:
        seen = {"loss": float(step.loss), "norm": float(step.norm)}
        run.log.skipped(run.step, run.tokens, run.guard.why, run.guard.skipped, seen)


def log_save(run: Run, figures: dict[str, Any]) -> None:
    """Log a save that has ended; how long the last one before a deadline may take is known by it."""
    run.clock.measured("save", figures["save_stall_s"] + figures.get("save_background_s", 0.0))
    if run.log:
        run.log.saved(figures)


def evaluate(run: Run) -> None:
    """Log the mean loss over the first `train.eval_batches` global batches of held-out documents."""
    if run.held_out is None:
        return
    run.held_out.reset()
    total, targets = 0.0, 0
    by_position = LossByPosition(run.engine.deepspeed.module, run.engine.loss_of, run.mesh, run.cfg.data.seq_len)
    for _ in range(run.cfg.train.eval_batches):
        batches, totals = next_batches(run, run.held_out)
        by_position.expect([b.labels for b in batches])
        run.clock.alive()
        total += float(run.engine.eval_step(batches, totals.targets)) * totals.targets
        targets += totals.targets
    positions = by_position.read()
    if run.log:
        loss = total / max(targets, 1)
        run.log.validation({"step": run.step, "tokens": run.tokens, "val_loss": loss, **positions})


def write_health(run: Run, watch: health.Watch) -> None:
    """Log what `watch` saw in this step; nothing under full attention."""
    seen = watch.read(run.mesh)
    if run.log and seen:
        run.log.health({"step": run.step, "tokens": run.tokens, **seen})


def start(text: str, stop: Stop) -> tuple[int, str]:
    """The whole run on this rank, from the resolved configuration. Returns the exit code and the reason."""
    cfg = from_text(text)
    check(cfg, dist.get_world_size())
    place = mesh.build(cfg.parallel.tp, cfg.parallel.pp)
    clock = Clock(deadline(cfg.run.time_limit))
    watchdog = hang.Watchdog(clock, place, Path(cfg.run.dir), cfg.parallel.timeout)
    loader = together(lambda: open_loader(cfg, place, "train", sources(cfg.data)), place)
    val = loader.holding("val")
    held_out = together(lambda: open_loader(cfg, place, "val", val), place) if val else None
    vocab = vocabulary(cfg, loader)
    found = checkpoint.find(Path(cfg.run.dir), place, cfg.resume, describe(cfg, place, vocab))
    here = environment(place, loader.fingerprint)
    full = baseline.find(cfg, text, here, place, vocab, lambda: open_loader(cfg, place, "train", sources(cfg.data)))
    with memory.explained(place):
        engine = Engine(cfg, vocab, place)
    run = Run(
        cfg,
        place,
        stop,
        vocab,
        loader,
        held_out,
        engine,
        Meter(cfg, place, full),
        Guard(cfg.guard, cfg.train.steps),
        clock,
        Stragglers(place),
    )
    run.rollbacks = agree(place, lambda: rollbacks.read(Path(cfg.run.dir)))
    loader.skip += [tuple(r["batches"]) for r in run.rollbacks]
    if found:
        run.restore(*found)
    elif cfg.train.start_from:
        checkpoint.begin(Path(cfg.train.start_from), run.engine, place, describe(cfg, place, vocab))
    run.saver = Saver(Path(cfg.run.dir), run.engine, place, cfg.checkpoint, lambda figures: log_save(run, figures))
    if place.rank == 0:
        run.log = RunLog(cfg, text, here, run.wandb_id)
        run.wandb_id = run.log.wandb_id
        run.clock.begin(Path(cfg.run.dir))
        run.log.say(f"continues {found[0]}" if found else f"starts {cfg.run.dir}")
        full.keep(Path(cfg.run.dir))
        if full.source:
            run.log.say(f"full attention has {full.tokens_per_s:,.0f} tokens/s ({full.source})")
    code, reason = RunError.code, "internal error"
    try:
        with memory.explained(place):
            code, reason = train(run)
    except Exception as e:
        run.saver.settle()
        code, reason = (e.code, str(e)) if isinstance(e, RunError) else (code, reason)
        raise
    finally:
        watchdog.stop()
        if run.log:
            run.log.close(code, reason, run.clock.goodput())
    return code, reason


def open_loader(cfg: Config, place: Mesh, split: str, mix: dict[str, float]) -> Loader | RandomRows:
    """The rows of this rank's data-parallel coordinate."""
    d, t = cfg.data, cfg.train
    if d.random:
        return RandomRows(
            d.random, d.seq_len, t.global_batch, t.micro_batch, cfg.seed, place.dp.rank, place.dp.size, d.skip
        )
    loader = Loader(
        mix, split, d.seq_len, t.global_batch, t.micro_batch, cfg.seed,
        place.dp.rank, place.dp.size, d.long_documents, d.verify, d.on_bad_shard, d.read_ahead,
        Limits(d.cache_dir, int(d.cache_gib * 2**30), d.timeout), d.skip if split == "train" else (),
    )  # fmt: skip
    if place.rank == 0 and d.on_bad_shard is OnBadShard.stop:
        loader.check()
    return loader


def vocabulary(cfg: Config, loader: Loader | RandomRows) -> int:
    """Size of the model's vocabulary: the user's, or the data's rounded up to 128 for the matrix units."""
    size, tp = cfg.model.vocab_size or -(-loader.vocab_size // 128) * 128, cfg.parallel.tp
    if size < loader.vocab_size:
        why = f"smaller than the {loader.vocab_size} tokens of the data"
        raise ConfigError("config", f"model.vocab_size={size}", why, f"give at least {loader.vocab_size}, or null")
    if size % tp:
        why = f"does not divide the vocabulary of {size}"
        raise ConfigError("config", f"parallel.tp={tp}", why, f"set model.vocab_size to a multiple of {tp}")
    return size


def describe(cfg: Config, place: Mesh, vocab: int) -> dict[str, Any]:
    """The model, in which a checkpoint must agree to be continued, and how it is cut, which may change."""
    identity = {f"model.{k}": v for k, v in vars(cfg.model).items() if k != "name"}
    identity |= {f"attention.{k}": v for k, v in vars(cfg.attention).items() if k != "backend"}
    identity["model.vocab_size"] = vocab
    layout = {"parallel.tp": place.tp.size, "parallel.pp": place.pp.size, "parallel.zero": cfg.parallel.zero}
    layout |= {"data-parallel ranks": place.dp.size, "train.precision": cfg.train.precision}
    return {"identity": plain(identity), "layout": plain(layout)}


def plain(value: Any) -> Any:
    """JSON from dataclass fields: enums by value, containers inside out."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value.value if isinstance(value, Enum) else value


def shared_config(store: dist.Store, rank: int, world: int) -> Optional[str]:
    """The resolved configuration: rank 0 composes it, the others wait for it, and leave with its code if it is bad."""
    if rank != 0:
        answer = store.get("config").decode()
        if answer.startswith("exit "):
            raise SystemExit(int(answer.split()[1]))
        return answer
    try:
        text = compose(world)
    except RunError as e:
        store.set("config", f"exit {e.code}")
        raise
    store.set("config", text or "exit 0")
    return text


def main() -> int:
    """Run alone or under torchrun. Returns the exit code; rank 0 also writes it into the file $SPARSETRON_EXIT_FILE."""
    os.umask(0o027)  # what a run writes is for its user, and for the group to read
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()  # with torchrun gone nobody would end this process
    stop, code = Stop(), 0
    if is_multirun() and os.environ.get("WORLD_SIZE", "1") == "1":
        return sweep.main(stop)
    store, rank, world = mesh.rendezvous()
    try:
        text = shared_config(store, rank, world)
        if text:  # without one, Hydra showed something
            cfg = from_text(text)
            if cfg.deterministic:
                repeat.deterministic()
            mesh.start_processes(store, rank, world, hang.SLOW * cfg.parallel.timeout)
            code, _ = start(text, stop)
            dist.destroy_process_group()
    except RunError as e:
        code = e.code
        if rank == 0 or e.alone:
            print(e, file=sys.stderr, flush=True)
        # Threads of its groups, still at work when the process ends, now and then abort it.
        if dist.is_initialized() and not e.alone:
            dist.destroy_process_group()
    if rank == 0 and "SPARSETRON_EXIT_FILE" in os.environ:
        Path(os.environ["SPARSETRON_EXIT_FILE"]).write_text(str(code))
    return code


def leave(code: int) -> None:
    """End the process. After an error at once: threads of libraries now and then abort it, and its code is lost."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)
    sys.exit(0)


if __name__ == "__main__":
    leave(main())
