"""What a plan assumes of GPUs, of what connects them, and of how well they are used. Every such number is here."""

from dataclasses import dataclass

from parallel.metrics import device_peak

GIB = 2**30
CONTEXT = 0.8  # GiB outside torch's allocator: CUDA context and loaded kernels
NCCL = 0.4  # GiB of each process group of several ranks
FRAGMENTED = 1.06  # memory that torch's allocator takes over what it gives out, at the peak
NODE = 8  # GPUs
NETWORK = 50.0  # GB/s between nodes, each way and for each GPU: 400 Gb/s
# Of the bf16 peak, forward and backward together: matrix products; attention, in causal FLOPs; NSA, in those it needs,
# by its kernels, or without them (one model on an H200, 8,192 tokens).
EFFICIENCY = {"linear": 0.6, "full": 0.4, "nsa": 0.2, "nsa without kernels": 0.001}


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str  # as parallel/metrics.py knows it
    gib: float  # as torch reports it
    link: float  # GB/s of collectives among the GPUs of a node

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s."""
        peak = device_peak(self.name)
        assert peak is not None, self.name
        return peak


@dataclass(frozen=True)
class Cluster:
    """So many GPUs of a kind."""

    gpus: int
    gpu: Gpu
    node: int = NODE
    network: float = NETWORK

    def link(self, span: int) -> float:
        """GB/s among neighbours from the first of whom to the last there are `span` GPUs."""
        return self.gpu.link if span <= self.node else self.network


GPUS = {
    "h200": Gpu("H200", 139.8, 345.0),  # measured: bus bandwidth of an all-reduce of 512 MiB among four
    "h100": Gpu("H100", 79.1, 345.0),
    "b200": Gpu("B200", 178.3, 690.0),
    "a100": Gpu("A100", 79.1, 230.0),
    "a100-40": Gpu("A100", 39.4, 230.0),
    "l40s": Gpu("L40S", 44.4, 20.0),
    "l4": Gpu("L4", 22.0, 20.0),
    "a10g": Gpu("A10G", 22.0, 20.0),
}
