"""Native sparse attention of local heads, and the one place that picks what computes it."""

from torch import Tensor

from configs.errors import ConfigError
from configs.schema import Attention, Backend, Branch
from nsa import reference


def check_backend(sizes: Attention) -> None:
    """Raises ConfigError if `sizes.backend` cannot run."""
    if sizes.backend is Backend.triton:
        why = "this version has no Triton kernels"
        raise ConfigError("config", "attention.backend=triton", why, "give torch or auto")


def nsa_attention(
    q: Tensor,
    kv: dict[str, tuple[Tensor, Tensor]],
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor,
    sizes: Attention,
) -> Tensor:
    """The gated sum of the branches `sizes.branches` names (arXiv 2502.11089, Eq. 5), o [n, h, dv] in q's dtype.

    q [n, h, dk], rotated. kv: for slc and win, where active, rotated keys [n, h_kv, dk] and values [n, h_kv, dv].
    k_cmp [m, h_kv, dk], compressed then rotated, and v_cmp [m, h_kv, dv]; v_cmp is None where the blocks only score,
    both are None where neither cmp nor slc is active. gates [n, h, branches] in the order of `sizes.branches`.
    cu_seqlens [documents + 1] in host memory. Raises ValueError for shapes that do not fit.
    """
    check_backend(sizes)
    _check(q, kv, k_cmp, v_cmp, gates, cu_seqlens, sizes)
    return reference.nsa(q, kv, k_cmp, v_cmp, gates, cu_seqlens, sizes)


def _check(q, kv, k_cmp, v_cmp, gates, cu_seqlens, sizes) -> None:
    n, heads, qk_dim = q.shape
    if cu_seqlens.is_cuda or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n:
        raise ValueError(f"cu_seqlens must be in host memory and run from 0 to {n}, not {cu_seqlens}")
    if gates.shape != (n, heads, len(sizes.branches)):
        raise ValueError(
            f"gates {tuple(gates.shape)} do not fit {n} tokens, {heads} heads, {len(sizes.branches)} branches"
        )
    for name in (b.value for b in sizes.branches if b is not Branch.cmp):
        k, v = kv[name]
        if k.shape[::2] != (n, qk_dim) or v.shape[:2] != k.shape[:2] or heads % k.shape[1]:
            raise ValueError(
                f"{name}: keys {tuple(k.shape)}, values {tuple(v.shape)} do not fit queries {tuple(q.shape)}"
            )
    if {Branch.cmp, Branch.slc} & set(sizes.branches):
        blocks = int(reference.block_starts(cu_seqlens, sizes.l, sizes.d)[0][-1])
        if k_cmp is None or len(k_cmp) != blocks or k_cmp.shape[2] != qk_dim or heads % k_cmp.shape[1]:
            shape = None if k_cmp is None else tuple(k_cmp.shape)
            raise ValueError(
                f"compressed keys {shape} are not the {blocks} blocks of these documents at width {qk_dim}"
            )
    if Branch.cmp in sizes.branches and (v_cmp is None or v_cmp.shape[:2] != k_cmp.shape[:2]):
        raise ValueError("the cmp branch needs a compressed value for each compressed key")
    used = [kv[b.value] if b is not Branch.cmp else (k_cmp, v_cmp) for b in sizes.branches]
    kv_heads = {k.shape[1] for k, _ in used} | ({k_cmp.shape[1]} if Branch.slc in sizes.branches else set())
    v_dims = {v.shape[2] for _, v in used}
    if len(kv_heads) > 1 or len(v_dims) > 1:  # these would broadcast in silence where one of them is 1
        raise ValueError(f"branches disagree: KV heads {sorted(kv_heads)}, value widths {sorted(v_dims)}")
