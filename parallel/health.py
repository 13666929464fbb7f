"""The health of sparse attention in one step of a run, from all ranks."""

from statistics import fmean

from torch import Tensor, nn

from configs.schema import Attention
from nsa import NSACore
from nsa.health import measure
from parallel.comm import host_gather
from parallel.mesh import Mesh


class Watch:
    """Measures the next forward pass of each sparse layer below `module`; passes after it are not looked at."""

    def __init__(self, module: nn.Module, sizes: Attention):
        self.sizes = sizes
        self.seen: dict[int, dict[str, float]] = {}
        for name, core in module.named_modules():
            if isinstance(core, NSACore):
                core.observe = self._observer(core, layer=int(name.split(".")[0]) - 1)  # 0 is the embedding

    def _observer(self, core: NSACore, layer: int):
        def observe(q: Tensor, k_cmp: Tensor | None, gates: Tensor, cu_seqlens: Tensor) -> None:
            core.observe = None
            self.seen[layer] = measure(q.detach(), k_cmp, gates.detach(), cu_seqlens, self.sizes)

        return observe

    def read(self, mesh: Mesh) -> dict[str, float]:
        """sparsity/MEASURE/layer_NN, each the mean over the ranks that hold the layer. Collective."""
        values: dict[str, list[float]] = {}
        for seen in host_gather(self.seen, mesh):
            for layer, measures in seen.items():
                for name, value in measures.items():
                    values.setdefault(f"sparsity/{name}/layer_{layer:02}", []).append(value)
        return {key: fmean(values[key]) for key in sorted(values)}
