"""The model as DeepSpeed's pipeline wants it: a layer list cut into stages with equal numbers of blocks."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe import schedule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from configs.schema import Config
from parallel import tied
from parallel.attention import Documents
from parallel.loss import CrossEntropy
from parallel.mesh import Mesh
from parallel.transformer import layers

deepspeed.utils.logger.setLevel("ERROR")

PARTS = {  # of a step, by the instruction of DeepSpeed's schedule
    schedule.ForwardPass: "forward",
    schedule.BackwardPass: "backward",
    schedule.OptimizerStep: "optimizer",
    schedule.ReduceGrads: "reduce_gradients",
    # Sent and received with the neighbouring stages, and what this one waits for them.
    schedule.SendActivation: "stages",
    schedule.RecvActivation: "stages",
    schedule.SendGrad: "stages",
    schedule.RecvGrad: "stages",
}


class Pipeline(PipelineModule):
    """This rank's stage. Each forward pass takes the next of `documents`: stages pass on one tensor only, so each stage
    reads the boundaries of its micro-batches from its own loader, whose order is the same on all of them."""

    def __init__(self, cfg: Config, vocab: int, mesh: Mesh, loss: CrossEntropy):
        self.documents: Iterator[Documents] = iter(())
        with contextlib.redirect_stdout(io.StringIO()):  # its constructor prints
            super().__init__(
                [LayerSpec(cls, *args) for cls, args in layers(cfg, vocab, mesh)],
                topology=PipeModelDataParallelTopology(mesh.pp.size, mesh.tp.size, mesh.dp.size),
                loss_fn=lambda logits, labels_scale: loss(logits, labels_scale[0]) * labels_scale[1],
                partition_method="type:^Block$",
            )
        if cfg.model.tie_embeddings and mesh.is_last_stage:
            tied.copy(self.forward_funcs[-1])

    def forward(self, x: Tensor) -> Tensor:
        documents = next(self.documents)
        for layer in self.forward_funcs:
            x = layer(x, documents)
        return x


def instructions(engine: Any) -> dict[type, Callable[..., Any]]:
    """What DeepSpeed's engine does at each instruction of its schedule, without the logits that it would hold on to:
    the last stage has two places for outputs, that nothing reads, as backward begins at the loss."""
    do = dict(engine._INSTRUCTION_MAP)

    def forward(self: Any, buffer_id: int) -> None:
        engine_forward(self, buffer_id)
        if self.is_last_stage():
            self.pipe_buffers["outputs"][buffer_id] = None

    engine_forward = do[schedule.ForwardPass]
    return {**do, schedule.ForwardPass: forward}
