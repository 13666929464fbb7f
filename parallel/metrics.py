"""Model FLOPs of a step, and the figures made of them.

FLOPs are those of the matrix products that the model needs, forward and backward, causal, exact for each document,
without recomputation (convention `nsa-exact-causal-v1`). What a kernel computes and masks is not counted, nor are
selection scores that the compressed branch has already computed, nor softmax and other element-wise work.
"""

import dataclasses
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from configs.schema import Branch, Compression, Config, Kind

CONVENTION = "nsa-exact-causal-v1"
BACKWARD = 3  # forward and backward together are three forwards: each product has two in backward

PEAKS = {  # dense bf16 FLOP/s by the vendor's data sheet
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "GH200": 989.4e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
}


@dataclass(frozen=True)
class Flops:
    """Forward and backward, by part."""

    linear: int  # projections, MLP and head
    compress: int  # the compression MLPs
    cmp: int
    slc: int
    win: int
    full: int

    @property
    def attention(self) -> int:
        return self.cmp + self.slc + self.win + self.full

    @property
    def total(self) -> int:
        return self.linear + self.compress + self.attention


def dense_keys(length: int) -> int:
    """Keys that the queries of a document see in causal attention, summed."""
    return length * (length + 1) // 2


def compressed_keys(length: int, l: int, d: int) -> int:
    """Summed over the queries: whole compression blocks that end at or before them."""
    if length < l:
        return 0
    q, r = divmod(length - l + 1, d)  # q whole strides of queries, then r more
    return d * q * (q + 1) // 2 + r * (q + 1)


def selected_keys(length: int, l_slc: int, n: int) -> int:
    """Summed over the queries: tokens of n blocks, the last of which is the query's own up to itself."""
    dense = min(length, n * l_slc)
    blocks, rest = divmod(length - dense, l_slc)
    whole = blocks * (n * l_slc * l_slc - l_slc * (l_slc - 1) // 2)
    return dense_keys(dense) + whole + rest * (n - 1) * l_slc + dense_keys(rest)


def window_keys(length: int, w: int) -> int:
    """Summed over the queries: the last w tokens."""
    return dense_keys(min(length, w)) + max(0, length - w) * w


def blocks(length: int, l: int, d: int) -> int:
    """Whole compression blocks of a document."""
    return max(0, (length - l) // d + 1)


def flops(cfg: Config, vocab_size: int, lengths: Iterable[int]) -> Flops:
    """Of the packed documents of these lengths. Padding counts as the document that it is packed as."""
    lengths = list(lengths)
    m, a = cfg.model, cfg.attention
    pair = BACKWARD * 2 * m.layers * m.heads  # a key of a query: one product of its width, a multiply and an add each
    keys = dict.fromkeys(("cmp", "slc", "win", "full"), 0)
    compress = 0
    if a.kind is Kind.full:
        keys["full"] = sum(map(dense_keys, lengths)) * (m.qk_dim + m.v_dim)
    else:
        keys.update(_sparse_keys(cfg, lengths))
        compress = BACKWARD * 2 * m.layers * m.kv_heads * sum(blocks(t, a.l, a.d) for t in lengths) * _phi(cfg)
    linear = BACKWARD * 2 * sum(lengths) * linear_weights(cfg, vocab_size)
    return Flops(linear, compress, **{name: pair * count for name, count in keys.items()})


def dense_equivalent(cfg: Config, vocab_size: int, lengths: Iterable[int]) -> Flops:
    """Of the same run with full attention."""
    full = dataclasses.replace(cfg, attention=dataclasses.replace(cfg.attention, kind=Kind.full))
    return flops(full, vocab_size, lengths)


def linear_weights(cfg: Config, vocab_size: int) -> int:
    """Weights of the products that every token goes through once. The embedding is a look-up and not among them."""
    m, a = cfg.model, cfg.attention
    pairs = 1 if a.kind is Kind.full or a.shared_kv else len(a.branches)
    attention = m.heads * (m.qk_dim + m.v_dim) + pairs * m.kv_heads * (m.qk_dim + m.v_dim)
    gate = m.heads * len(a.branches) if a.kind is Kind.nsa else 0
    return m.layers * m.dim * (attention + gate + 3 * m.mlp_dim) + m.dim * vocab_size


def _phi(cfg: Config) -> int:
    """Weights of the two compression MLPs, which a block of a KV head goes through once."""
    m, a = cfg.model, cfg.attention
    if a.compression is Compression.mean or Branch.cmp not in a.branches:
        return 0
    return sum((a.l + 1) * width * (a.phi_hidden or width) for width in (m.qk_dim, m.v_dim))


def _sparse_keys(cfg: Config, lengths: list[int]) -> dict[str, int]:
    """Keys times the width of their products, by branch."""
    m, a = cfg.model, cfg.attention
    width, out = m.qk_dim + m.v_dim, {}
    cmp = sum(compressed_keys(t, a.l, a.d) for t in lengths)
    if Branch.cmp in a.branches:
        out["cmp"] = cmp * width
    if Branch.slc in a.branches:
        out["slc"] = sum(selected_keys(t, a.l_slc, a.n) for t in lengths) * width
        if Branch.cmp not in a.branches:  # scores that no branch shares; they have no backward
            out["slc"] += cmp * m.qk_dim // BACKWARD
    if Branch.win in a.branches:
        out["win"] = sum(window_keys(t, a.w) for t in lengths) * width
    return out


def device_peak(name: str) -> Optional[float]:
    """Dense bf16 FLOP/s of a device by the name it gives itself; None if unknown (then there is no MFU)."""
    return next((peak for key, peak in PEAKS.items() if key in name.replace("-", " ").split("NVIDIA ")[-1]), None)


def throughput(
    model_flops: int,
    dense_flops: int,
    tokens: int,
    seconds: float,
    world: int,
    peak: Optional[float],
    full_tokens_per_s: Optional[float],
) -> dict[str, Any]:
    """The accounting of an interval, logged together. TFLOP/s are per device; None where a figure cannot be known.

    `dense_equiv_tflops` is what the full-attention twin would need at this speed and may exceed the peak: it is no MFU.
    `saving_realised` is the speed-up over the measured twin, divided by the FLOPs that sparsity saves.
    """
    rate, saving = tokens / seconds, dense_flops / model_flops
    per_device = model_flops / seconds / world
    speedup = rate / full_tokens_per_s if full_tokens_per_s else None
    return {
        "tokens_per_s": rate,
        "tokens_per_s_per_gpu": rate / world,
        "model_tflops": per_device / 1e12,
        "mfu": per_device / peak if peak else None,
        "peak_tflops": peak / 1e12 if peak else None,
        "dense_equiv_tflops": dense_flops / seconds / world / 1e12,
        "flop_saving": saving,
        "speedup_vs_full": speedup,
        "saving_realised": speedup / saving if speedup else None,
        "flops_convention": CONVENTION,
    }


def reset_memory(device: torch.device) -> None:
    """Begin a new peak for `memory_gib`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # a kernel that does not let us
        Path("/proc/self/clear_refs").write_text("5")


def memory_gib(device: torch.device) -> float:
    """The most memory this process has used: of the device, or resident where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
