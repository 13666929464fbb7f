"""Which sizes the Triton kernels of NSA take, known before anything is built. Standard library only."""

import os

from configs.schema import Attention, Backend, Config, Precision

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when triton is imported, by triton as well
MOST = 64  # blocks beyond the local ones that a query can choose


def misfit(qk_dim: int, v_dim: int, group: int, sizes: Attention, fp32: bool) -> str | None:
    """Why the kernels cannot take heads of these widths, `group` of them to a KV head, or None."""
    least = 4 if INTERPRETED else 16  # 16 bytes of fp32; what products take on a GPU
    for name, width, parts in (("query and key", qk_dim, 2), ("value", v_dim, 1)):  # keys: a sum of two powers of two
        if width.bit_count() > parts or width & -width < least or width.bit_length() > 8:
            return f"the {name} width is {width}; they take 16, 32, 64, 128, and for keys 192 and the like"
    if group & (group - 1) or group > 64:
        return f"{group} heads share a KV head; they take groups of 1, 2, 4, ... 64"
    if sizes.l_slc & (sizes.l_slc - 1) or not (least <= sizes.l_slc <= 128):
        return f"l_slc is {sizes.l_slc}; they take 16, 32, 64 and 128"
    if fp32 and sizes.l_slc > 64 and max(qk_dim, v_dim) > 64:  # no room for them in shared memory
        return f"l_slc is {sizes.l_slc}; with heads wider than 64 in float32 they take at most 64"
    if sizes.n - sizes.local > MOST:
        return f"n is {sizes.n} with local={sizes.local}; they take at most {MOST + sizes.local}"
    return None


def misfit_of(cfg: Config) -> str | None:
    """The same of a run."""
    m = cfg.model
    return misfit(m.qk_dim, m.v_dim, m.heads // m.kv_heads, cfg.attention, cfg.train.precision is Precision.fp32)


def without(cfg: Config) -> str | None:
    """Why a sparse run on GPUs does without the kernels, or None."""
    return "as asked for" if cfg.attention.backend is Backend.torch else misfit_of(cfg)
