"""DeepSpeed's engine behind one `train_step`: the plain engine with ZeRO 1 to 3 on one pipeline stage, the pipeline
engine with ZeRO 1 on several. Its configuration comes from ours; nobody writes one by hand.
"""

import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import Config, Optim, Precision, micro_batches
from parallel import init
from parallel.attention import Documents
from parallel.loss import vocab_parallel_cross_entropy
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
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
        """Copy to the device."""
        tokens, labels = (x.flatten().to(device).long() for x in (batch.tokens, batch.labels))
        return cls(tokens, labels, Documents.of(batch.cu_seqlens, device))


class Engine:
    """The model of this rank with its optimizer, ready to train. Collective to build, and in every method."""

    def __init__(self, cfg: Config, vocab: int, mesh: Mesh):
        # Without this DeepSpeed compiles a shared-memory collective with g++ at start (86 s); it has no switch for it.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self.mesh = mesh
        self.gas = micro_batches(cfg, mesh.world)
        module = Pipeline(cfg, vocab, mesh) if mesh.pp.size > 1 else Transformer(cfg, vocab, mesh)
        init.initialize(module, cfg.model, cfg.seed, mesh.tp)
        module.universal_checkpoint_info = universal_checkpoint_info(module)
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer(module, cfg.optim, mesh.device),
            config=deepspeed_config(cfg, mesh),
            mpu=None if mesh.pp.size > 1 else _Mpu(mesh),
        )

    def train_step(self, batches: Iterable[Batch], targets: int, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step over this rank's micro-batches.

        `targets` is the number of labels in the whole global batch. Returns the mean loss over them and the global
        gradient norm before clipping, as scalars that the host has not waited for.
        """
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        micro = [MicroBatch.of(b, self.mesh.device) for b in batches]
        scale = torch.tensor(self.gas * self.mesh.dp.size / max(targets, 1), device=self.mesh.device)
        run = self._train_pipeline if self.mesh.pp.size > 1 else self._train_plain
        loss = run(micro, scale)
        norm = self.deepspeed.get_global_grad_norm()  # None where it was not a number
        return loss, torch.as_tensor(float("nan") if norm is None else norm)

    def eval_step(self, batches: Iterable[Batch], targets: int) -> Tensor:
        """Mean loss over the `targets` labels of a global batch, without learning from it."""
        micro = [MicroBatch.of(b, self.mesh.device) for b in batches]
        scale = torch.tensor(len(micro) * self.mesh.dp.size / max(targets, 1), device=self.mesh.device)
        run = self._eval_pipeline if self.mesh.pp.size > 1 else self._eval_plain
        return run(micro, scale)

    def save(self, directory: str, tag: str, state: dict[str, Any]) -> None:
        """Write this rank's shards and `state` below `directory/tag`."""
        self.deepspeed.save_checkpoint(directory, tag=tag, client_state=state, save_latest=False)

    def load(self, directory: str, tag: str) -> dict[str, Any]:
        """Read what `save` wrote on the same layout; returns its state."""
        path, state = self.deepspeed.load_checkpoint(directory, tag=tag)
        if path is None:
            raise FileNotFoundError(f"{directory}/{tag}")
        return state

    def load_converted(self, directory: str, tag: str) -> None:
        """Read what `convert` wrote, on any layout with ZeRO 1 or 2."""
        self.deepspeed._config.load_universal_checkpoint = True
        try:
            self.load(directory, tag)
        finally:
            self.deepspeed._config.load_universal_checkpoint = False

    def _train_plain(self, micro: list[MicroBatch], scale: Tensor) -> Tensor:
        self.deepspeed.train()
        total = torch.zeros((), device=self.mesh.device)
        for batch in micro:
            loss = self._loss(batch, scale)
            self.deepspeed.backward(loss)
            self.deepspeed.step()
            total += loss.detach()
        return self._mean(total, len(micro))

    def _eval_plain(self, micro: list[MicroBatch], scale: Tensor) -> Tensor:
        self.deepspeed.eval()
        with torch.no_grad():
            return self._mean(sum(self._loss(batch, scale) for batch in micro), len(micro))

    def _loss(self, batch: MicroBatch, scale: Tensor) -> Tensor:
        logits = self.deepspeed(batch.tokens, batch.documents)
        return vocab_parallel_cross_entropy(logits, batch.labels, self.mesh.tp) * scale

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
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch,
        "gradient_accumulation_steps": micro_batches(cfg, mesh.world),
        "gradient_clipping": cfg.optim.clip,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": cfg.parallel.zero,
            "overlap_comm": False,
            "reduce_bucket_size": 100_000_000,
            "allgather_bucket_size": 100_000_000,
            "stage3_param_persistence_threshold": 10_000,
        },
        # Partitioned stage boundaries are wrong under sequence parallelism, without an error.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if cfg.train.precision is Precision.bf16:
        out["bf16"] = {"enabled": True, "immediate_grad_update": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


def convert(shards: Path, output: Path) -> None:
    """Write shards of ZeRO 1 or 2, made on any layout, parameter by parameter (DeepSpeed's universal checkpoint).

    In a process of its own: the converter has no other entrance. Raises OSError with the end of what it said.
    """
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(shards), "--output_folder", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"conversion failed: {done.stderr.strip().splitlines()[-1:]}")


def universal_checkpoint_info(module: torch.nn.Module) -> dict[str, Any]:
    """What DeepSpeed's universal checkpoint has to know of the parameters to write them for another layout.

    Parameters cut by rows need nothing. The patterns hold for the whole model, as a converter reads one rank's.
    """
    names = [name for name, _ in module.named_parameters()]
    replicated = [r"\d+\.(attention_norm|mlp_norm|norm)\.weight$"]
    if any(".core." in name for name in names):
        replicated.append(r"\d+\.attention\.core\.")
    return {
        "universal_checkpoint_version": 0.4,
        "tp_replicated_parameter_patterns": replicated,
        "parameter_with_row_parallelism_patterns": [r"\d+\.(attention\.wo|mlp\.down)\.weight$"],
        "parameter_to_average_patterns": [],
        "parameter_with_2_sub_params_cat_dim_0": [],
        "parameter_with_sub_params": [],
        "vocabulary_parameter_patterns": [],
        "pipeline_replicated_parameter_patterns": [],
    }


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

    # Its universal checkpoint asks under the newer names.
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data
