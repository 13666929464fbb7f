"""DeepSpeed's engine behind one `train_step`: the plain engine with ZeRO 1 to 3 on one pipeline stage, the pipeline
engine with ZeRO 1 on several. Its configuration comes from ours; nobody writes one by hand.
"""

import contextlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor

from configs.schema import Config, Optim, Precision, micro_batches
from nsa.documents import Documents, send
from parallel import init, pieces, tied
from parallel.compiler import compiler, compiles
from parallel.guard import Guard
from parallel.host import HostMemory
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh
from parallel.norms import parameter_norms
from parallel.overlap import Reducer
from parallel.pipeline import PARTS, Pipeline, instructions
from parallel.stopwatch import OTHER, Stopwatch
from parallel.transformer import Transformer


class Batch(Protocol):
    """Rows on the host, as the loader gives them."""

    tokens: Tensor  # int32 [rows, seq_len]
    labels: Tensor  # int32 [rows, seq_len], IGNORE where nothing is predicted
    cu_seqlens: Tensor  # [documents + 1], over the flattened rows


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of a rank, flat over its n tokens, on the device."""

    tokens: Tensor  # [n]
    labels: Tensor  # [n]
    documents: Documents

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "MicroBatch":
        """Copy to the device, without waiting for it."""
        tokens, labels = (send(x.flatten(), device).long() for x in (batch.tokens, batch.labels))
        return cls(tokens, labels, Documents.of(batch.cu_seqlens, device))


class Engine:
    """The model of this rank with its optimizer, ready to train. Collective to build, and in every method."""

    def __init__(self, cfg: Config, vocab: int, mesh: Mesh):
        # Without this DeepSpeed compiles a shared-memory collective with g++ at start (86 s); it has no switch for it.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.mesh = mesh
        self.zero = cfg.parallel.zero
        self.gas = micro_batches(cfg, mesh.world)
        self.loss_of = CrossEntropy(mesh.tp, compiler(cfg.parallel, mesh.device))
        pipelined = mesh.pp.size > 1
        module = Pipeline(cfg, vocab, mesh, self.loss_of) if pipelined else Transformer(cfg, vocab, mesh)
        init.initialize(module, cfg.model, cfg.seed, mesh.tp)
        with contextlib.redirect_stdout(io.StringIO()):  # in bf16 it prints its memory, whatever its logger is told
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer(module, cfg.optim, mesh.device),
                config=deepspeed_config(cfg, mesh),
                mpu=None if pipelined else _Mpu(mesh),
            )
        self.stopwatch = Stopwatch(mesh.device)
        self._time_parts()
        self.guard: Optional[Guard] = None
        self.norms: dict[str, dict[str, float]] = {}  # of the last step that could have been the guard's last
        self.accepted: Optional[bool] = None  # by the guard, in this step; None: not asked yet
        self.deepspeed.optimizer.optimizer.register_step_pre_hook(self._before_update)
        if cfg.train.precision is Precision.bf16 and self.zero == 1:
            self._overlap_reduction()
        if cfg.model.tie_embeddings and pipelined:
            self._sum_tied(tied.at_an_end(module, mesh.pp), cfg.train.precision)
        self._update = self.deepspeed.optimizer.step
        self.deepspeed.optimizer.step = self._watched_update

    def train_step(
        self, batches: Iterable[Batch], targets: int, lr: float, guard: Optional[Guard] = None
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step over this rank's micro-batches.

        `targets` is the number of labels in the whole global batch. Returns the mean loss over them and the global
        gradient norm before clipping (NaN where it was no number), as scalars. Weights and optimizer stay as they are,
        on all ranks, if a gradient is no number or `guard`, asked once, does not accept the step.
        """
        self.guard, self.accepted = guard, None
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        micro = [MicroBatch.of(b, self.mesh.device) for b in batches]
        scale = torch.full((), self.gas * self.mesh.dp.size / max(targets, 1), device=self.mesh.device)
        run = self._train_pipeline if self.mesh.pp.size > 1 else self._train_plain
        loss = run(micro, scale)
        # Where DeepSpeed itself left the update out, as a gradient is no number, its norm may be an earlier step's.
        norm = torch.as_tensor(float("nan") if self.accepted is None else self.deepspeed.get_global_grad_norm())
        if self.accepted is None and guard:
            guard.accepts(float(loss), float(norm))
        return loss, norm

    def eval_step(self, batches: Iterable[Batch], targets: int) -> Tensor:
        """Mean loss over the `targets` labels of a global batch, without learning from it."""
        micro = [MicroBatch.of(b, self.mesh.device) for b in batches]
        scale = torch.full((), len(micro) * self.mesh.dp.size / max(targets, 1), device=self.mesh.device)
        run = self._eval_pipeline if self.mesh.pp.size > 1 else self._eval_plain
        return run(micro, scale)

    def close(self) -> None:
        """Give back what belongs to the model and its optimizer. Nothing can be done with this engine after it."""
        engine = self.deepspeed
        engine.destroy()
        parameter_offload.FWD_MODULE_STACK.clear()  # under ZeRO 3 it holds the last model that ran
        # Hooks of parameters and outputs hold DeepSpeed's objects, which hold those: cycles that Python does not see.
        for p in engine.module.parameters():
            p.grad, p.data = None, p.data.new_empty(0)
            vars(p).clear()
        for part in (engine.optimizer, engine, self):
            vars(part).clear()

    def host_memory(self, lock: bool = True) -> HostMemory:
        """Room for snapshots of this engine."""
        return HostMemory(self._masters(), lock)

    def snapshot(self, memory: Optional[HostMemory] = None) -> pieces.Snapshot:
        """Copy what this rank holds of weights and optimizer state to the host, into `memory` or what is new.

        Of parameters that tensor parallelism replicates only the first rank has it, of tied ones the first stage.
        """
        flat = (memory or self.host_memory(lock=False)).copy(self._flat())
        held = pieces.held(self.deepspeed.module, self.mesh, flat)
        copies = {tied.name_of("", p) for p in self.deepspeed.module.parameters() if tied.is_copy(p)}
        mine = [p for p in held if (p.place.dim is not None or self.mesh.tp.rank == 0) and p.place.name not in copies]
        return pieces.Snapshot(mine, updates=int(self._state(self._masters()[0])["step"]))

    def load(self, directory: Path) -> None:
        """Read what any layout's snapshots were, or the weights of an exported model. Raises KeyError, ValueError."""
        optimizer, reader = self.deepspeed.optimizer, pieces.Reader(directory)
        for master in self._masters():
            self._state(master)["step"].fill_(reader.updates or 0)
        with torch.no_grad():
            for piece in pieces.held(self.deepspeed.module, self.mesh, self._flat()):
                reader.fill(piece)
        if self.zero < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:  # small ones, which ZeRO 3 keeps whole
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

    def _flat(self) -> list[dict[str, Tensor]]:
        """The optimizer's flat tensors, by group and kind."""
        return [{**self._state(master), "weight": master} for master in self._masters()]

    def _masters(self) -> list[Tensor]:
        """The flat fp32 weights that AdamW updates on this rank, wherever this optimizer of DeepSpeed has them."""
        names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
        return next(getattr(self.deepspeed.optimizer, n) for n in names if hasattr(self.deepspeed.optimizer, n))

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        """AdamW's state of a master weight; before its first update the one that this update would begin with."""
        adamw = self.deepspeed.optimizer.optimizer
        if not adamw.state[master]:
            device = master.device if adamw.defaults["fused"] else "cpu"
            moments = {name: torch.zeros_like(master, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[master] = {"step": torch.zeros((), device=device), **moments}
        return adamw.state[master]

    def _time_parts(self) -> None:
        """What of a step is DeepSpeed's own: the reduction of gradients under ZeRO 1 (what backward has not hidden;
        2 and 3 have it inside backward), and the instructions of a pipeline."""
        if self.zero == 1:
            reduce = self.deepspeed.allreduce_gradients
            self.deepspeed.allreduce_gradients = self.stopwatch.timed("reduce_gradients", reduce)
        if self.mesh.pp.size > 1:
            every = instructions(self.deepspeed).items()
            timed = {cmd: self.stopwatch.timed(PARTS.get(cmd, OTHER), do) for cmd, do in every}
            self.deepspeed._INSTRUCTION_MAP = timed

    def _sum_tied(self, weight: Optional[torch.nn.Parameter], precision: Precision) -> None:
        """Both stages that have a tied weight get the sum of their gradients: before these are reduced where ZeRO cuts
        them then, else after, as reduction is under way during backward."""
        if weight is None:
            return
        early = precision is Precision.fp32
        name = "allreduce_gradients" if early else "buffered_allreduce_fallback"
        reduce = getattr(self.deepspeed, name)

        def reduce_and_sum(*args: Any, **kwargs: Any) -> None:
            if early:
                tied.add_the_others(weight.grad, self.mesh.pp)
            reduce(*args, **kwargs)
            if not early:
                tied.add_the_others(weight._hp_grad, self.mesh.pp)

        setattr(self.deepspeed, name, reduce_and_sum)

    def _overlap_reduction(self) -> None:
        optimizer = self.deepspeed.optimizer
        sizes = [[p.numel() for p in group] for group in optimizer.bf16_groups]
        self.reducer = Reducer(optimizer.fp32_groups_gradients_flat, sizes, self.mesh.dp, self.gas)
        optimizer._update_hp_grad = self._accumulate
        self.deepspeed.buffered_allreduce_fallback = lambda *args, **kwargs: self.reducer.finish()

    def _accumulate(self, lp: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        """BF16_Optimizer._update_hp_grad without the fp32 copy of the gradient, which took longer than the sum."""
        if lp.grad is None:
            return
        optimizer = self.deepspeed.optimizer
        total = optimizer.fp32_groups_gradients[group][index]
        total.add_(lp.grad.view(total.shape))
        lp._hp_grad = total
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            lp.grad.zero_()
        self.reducer.added(group, index)

    def _watched_update(self, *args: Any, **kwargs: Any) -> Any:
        if self.guard and self.guard.last_chance:
            self.norms = parameter_norms(self.deepspeed.module, self.mesh)
        return self._update(*args, **kwargs)

    def _before_update(self, adamw: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Runs when DeepSpeed has found the gradients finite and clipped them, before each of its calls of AdamW: the
        last moment to leave the update out, which for AdamW means to find no gradients."""
        if self.accepted is None:
            self.accepted = self.guard is None or self.guard.accepts(*self._loss_and_norm())
        if self.accepted:
            return
        for p in (p for group in adamw.param_groups for p in group["params"]):
            p.grad = None
            self._state(p)  # DeepSpeed takes hold of it after the first update, left out or not

    def _loss_and_norm(self) -> tuple[float, float]:
        """Of this step, from the last rank, so that all decide by the same bits."""
        if self.mesh.pp.size > 1:
            last = self.mesh.is_last_stage
            self.loss = self._mean(self.deepspeed.total_loss.detach().clone(), self.gas) if last else torch.zeros(())
        norm = torch.as_tensor(self.deepspeed.optimizer._global_grad_norm)
        both = torch.stack([x.float().to(self.mesh.device).reshape(()) for x in (self.loss, norm)])
        if self.mesh.world > 1:
            dist.broadcast(both, src=self.mesh.world - 1)
        loss, norm = both.tolist()
        return loss, norm

    def _train_plain(self, micro: list[MicroBatch], scale: Tensor) -> Tensor:
        self.deepspeed.train()
        total = torch.zeros((), device=self.mesh.device)
        for i, batch in enumerate(micro):
            with self.stopwatch.part("forward"):
                loss = self._loss(batch, scale)
            with self.stopwatch.part("backward"):
                self.deepspeed.backward(loss)
            total += loss.detach()
            if i == len(micro) - 1:
                self.loss = self._mean(total, len(micro))  # before the update, which depends on it
            with self.stopwatch.part("optimizer"):
                self.deepspeed.step()
        return self.loss

    def _eval_plain(self, micro: list[MicroBatch], scale: Tensor) -> Tensor:
        self.deepspeed.eval()
        with torch.no_grad():
            return self._mean(sum(self._loss(batch, scale) for batch in micro), len(micro))

    def _loss(self, batch: MicroBatch, scale: Tensor) -> Tensor:
        logits = self.deepspeed(batch.tokens, batch.documents)
        return self.loss_of(logits, batch.labels) * scale

    def _mean(self, total: Tensor, count: int) -> Tensor:
        """Mean over `count` micro-batches and the data-parallel ranks."""
        if self.mesh.dp.size > 1:
            dist.all_reduce(total, group=self.mesh.dp.handle)
        return total / (count * self.mesh.dp.size)

    def _train_pipeline(self, micro: list[MicroBatch], scale: Tensor) -> Tensor:
        self.deepspeed.module.documents = iter([b.documents for b in micro])
        return self.deepspeed.train_batch(iter([(b.tokens, (b.labels, scale)) for b in micro]))

    def _eval_pipeline(self, micro: list[MicroBatch], scale: Tensor) -> Tensor:
        self.deepspeed.module.documents = iter([b.documents for b in micro])
        data = iter([(b.tokens, (b.labels, scale)) for b in micro])
        return self.deepspeed.eval_batch(data, num_micro_batches=len(micro)).squeeze()


def optimizer(module: torch.nn.Module, cfg: Optim, device: torch.device) -> torch.optim.Optimizer:
    """AdamW with decay on matrices only. Each stage has a block, hence both groups: DeepSpeed pairs groups by index."""
    decay = [p for name, p in module.named_parameters() if p.ndim > 1 and not name.endswith(".pe")]
    rest = [p for name, p in module.named_parameters() if p.ndim < 2 or name.endswith(".pe")]
    groups = [{"params": decay, "weight_decay": cfg.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=device.type == "cuda")


def deepspeed_config(cfg: Config, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's settings for a run. Each value that is not a size avoids a fault that was seen without it."""
    leaves = ["Block"] if cfg.model.tie_embeddings else ["Block", "Head"]
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch,
        "gradient_accumulation_steps": micro_batches(cfg, mesh.world),
        "gradient_clipping": cfg.optim.clip,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
        "zero_optimization": {
            "stage": cfg.parallel.zero,
            "overlap_comm": False,
            "reduce_bucket_size": 100_000_000,
            "allgather_bucket_size": 100_000_000,
            "stage3_param_persistence_threshold": 10_000,
            # Gathered whole: what runs inside it can be compiled, as its parameters do not come and go there. A tied
            # head is none: gradients of a leaf are reduced when its own backward ends, before the embedding's is there.
            "leaf_module": {"classes": [f"parallel.transformer.{name}" for name in leaves]},
            # Its own linear reads the number of a weight: torch 2.11 compiles each block anew for that, and those past
            # the eighth not at all. Without compilation only that one lets go of gathered weights before backward.
            "memory_efficient_linear": not compiles(cfg.parallel, mesh.device),
        },
        # Partitioned stage boundaries are wrong under sequence parallelism, without an error.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if cfg.train.precision is Precision.bf16:
        out["bf16"] = {"enabled": True, "immediate_grad_update": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
        if cfg.parallel.zero < 3:
            out["communication_data_type"] = "fp32"  # or what was summed in fp32 would cross the ranks in bf16
    return out


class _Mpu:
    """Our mesh under the names that DeepSpeed's plain engine asks for."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        # DeepSpeed wants a handle of every group, also of one member.
        alone = [dist.new_group([r]) for r in range(mesh.world)][mesh.rank]
        self.model = mesh.tp.handle or alone
        self.data = mesh.dp.handle or alone

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp.rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    # Parts of it ask under the newer names.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data
