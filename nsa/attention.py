"""Native sparse attention of local heads, and the one place that picks what computes it."""

import warnings

import torch
from torch import Tensor

from configs.errors import ConfigError
from configs.rules import check_nsa
from configs.schema import Attention, Backend, Branch
from nsa import reference
from nsa.documents import check_blocks, check_documents

try:
    from nsa import fused
except ModuleNotFoundError as e:  # triton has no wheels outside Linux
    if (e.name or "").partition(".")[0] != "triton":
        raise
    fused = None

NO_TRITON = "triton is not installed"
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_backend(sizes: Attention) -> None:
    """Raises ConfigError if `sizes.backend` cannot run on this machine; configs.rules knows which sizes it takes."""
    if sizes.backend is not Backend.triton:
        return
    ready = fused is not None and (fused.INTERPRETED or torch.cuda.is_available())
    if not ready:
        why = NO_TRITON if fused is None else "the kernels need a GPU, and there is none"
        raise ConfigError("config", "attention.backend=triton", why, "give torch or auto")


def uses_kernels(q: Tensor, v_dim: int, kv_heads: int, sizes: Attention) -> bool:
    """Whether the kernels are to compute this, for queries q [n, h, dk].

    Raises ValueError if `sizes.backend` asks for them and they cannot. Warns where a GPU has to do without.
    """
    if sizes.backend is Backend.torch:
        return False
    why = NO_TRITON if fused is None else fused.unfit(q, v_dim, kv_heads, sizes)
    if sizes.backend is Backend.triton and why:
        raise ValueError(f"attention.backend=triton cannot run: {why}")
    if why and q.is_cuda and q.dtype is not torch.float64 and not torch.compiler.is_compiling():
        warnings.warn(f"NSA runs without its kernels, some 30 times slower: {why}", stacklevel=2)
    return not why and (q.is_cuda or sizes.backend is Backend.triton)


def nsa_attention(
    q: Tensor,
    kv: dict[str, tuple[Tensor, Tensor]],
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor,
    sizes: Attention,
    starts: Tensor | None = None,
) -> Tensor:
    """The gated sum of the branches `sizes.branches` names (arXiv 2502.11089, Eq. 5), o [n, h, dv] in q's dtype.

    q [n, h, dk], rotated. kv: for slc and win, where active, rotated keys [n, h_kv, dk] and values [n, h_kv, dv].
    k_cmp [m, h_kv, dk], compressed then rotated, and v_cmp [m, h_kv, dv]; v_cmp is None where the blocks only score,
    both are None where neither cmp nor slc is active. gates [n, h, branches] in the order of `sizes.branches`, none
    below 0. cu_seqlens [documents + 1] in host memory, which kernels copy to the device unless they are given the
    `starts` of `documents.Blocks`. All of one dtype, on one device. Raises ValueError for what does not fit.
    """
    _check_sizes(sizes)
    tensors = _named(kv, k_cmp, v_cmp, sizes)
    _check(q, tensors, gates, cu_seqlens, starts, sizes)
    if uses_kernels(q, _v_dim(tensors), _kv_heads(tensors), sizes):
        return fused.nsa(q, kv, k_cmp, v_cmp, gates, cu_seqlens, sizes, starts)  # and looks at the values of cu_seqlens
    check_documents(cu_seqlens, len(q))
    if "k_cmp" in tensors:
        check_blocks(k_cmp, cu_seqlens, sizes.l, sizes.d)
    return reference.nsa(q, kv, k_cmp, v_cmp, gates, cu_seqlens, sizes)


def _check_sizes(sizes: Attention) -> None:
    try:
        check_nsa(sizes)
    except ConfigError as e:
        _, where, why, fix = e.args
        raise ValueError(f"{where}: {why}; {fix}") from None


def _named(kv, k_cmp, v_cmp, sizes) -> dict[str, Tensor]:
    """The keys and values that the branches need, by name. Raises ValueError for one that is missing."""
    pairs = {"cmp": (k_cmp, v_cmp), **kv}
    names = [f"{x}_{b.value}" for b in sizes.branches for x in "kv"]
    names += ["k_cmp"] if Branch.slc in sizes.branches else []
    found = {name: pairs.get(name[2:], (None, None))["kv".index(name[0])] for name in names}
    for name, x in found.items():
        if x is None:
            raise ValueError(f"{name} is missing; the branches {[b.value for b in sizes.branches]} need it")
    return found


def _kv_heads(tensors: dict[str, Tensor]) -> int:
    return next(x.shape[1] for x in tensors.values())


def _v_dim(tensors: dict[str, Tensor]) -> int:
    return next(x.shape[2] for name, x in tensors.items() if name[0] == "v")


def _check(
    q: Tensor, tensors: dict[str, Tensor], gates: Tensor, cu_seqlens: Tensor, starts: Tensor | None, sizes: Attention
) -> None:
    """Types, places and shapes; nothing that reads values, so that a compiler can trace it."""
    if q.dim() != 3 or 0 in q.shape or q.dtype not in TYPES:
        wanted = "[tokens, heads, width], none of them 0, of 16, 32 or 64 bit floating point"
        raise ValueError(f"q is {q.dtype} of shape {tuple(q.shape)}; it must be {wanted}")
    for name, x in {"gates": gates, **tensors}.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}; it must be {q.dtype} on {q.device} as q is")
        if x.dim() != 3:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}; it must have three dimensions")
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be in host memory")
    wanted = ((2, cu_seqlens.numel()), torch.int32, q.device)
    if starts is not None and (found := (tuple(starts.shape), starts.dtype, starts.device)) != wanted:
        raise ValueError(f"starts is {found}; it must be {wanted}, as Documents.blocks makes it")
    n, heads, qk_dim = q.shape
    kv_heads, v_dim = _kv_heads(tensors), _v_dim(tensors)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"q has {heads} heads; it must have a multiple of the {kv_heads} KV heads")
    blocks = len(tensors["k_cmp"]) if "k_cmp" in tensors else 0
    fits = {name: (blocks if name.endswith("cmp") else n, kv_heads) for name in tensors}
    fits = {name: (*size, qk_dim if name[0] == "k" else v_dim) for name, size in fits.items()}
    for name, x in {"gates": gates, **tensors}.items():
        size = fits.get(name, (n, heads, len(sizes.branches)))
        if x.shape != size:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}; beside q {tuple(q.shape)} it must be {size}")
