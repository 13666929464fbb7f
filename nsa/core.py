"""The part of an NSA layer between its projections: compression, rotation, attention of local heads."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import Attention, Branch, Compression
from nsa import reference
from nsa.attention import nsa_attention, uses_kernels
from nsa.documents import Blocks, Documents
from nsa.memory import UNITS


class Phi(nn.Module):
    """The learnable compression of Eq. 7 for heads of width e; weights are created empty."""

    def __init__(self, l: int, d: int, e: int, hidden: int):
        super().__init__()
        self.l, self.d = l, d
        self.pe = nn.Parameter(torch.empty(l, e))
        self.w1 = nn.Parameter(torch.empty(hidden, l * e))
        self.b1 = nn.Parameter(torch.empty(hidden))
        self.w2 = nn.Parameter(torch.empty(e, hidden))
        self.b2 = nn.Parameter(torch.empty(e))

    def forward(self, x: Tensor, blocks: Blocks, share: Callable[[Tensor], Tensor], kernels: bool) -> Tensor:
        """x [n, h, e] -> [m, h, e]."""
        pe, w1, b1, w2, b2 = (share(p) for p in (self.pe, self.w1, self.b1, self.w2, self.b2))
        if not kernels:
            return reference.compress_mlp(x, blocks.first, pe, w1, b1, w2, b2)
        # What is added to every block before a linear layer is a part of that layer's bias.
        hidden = _block_linear(x, w1, blocks, self.l, self.d) + F.linear(pe.flatten(), w1, b1)
        return F.linear(F.gelu(hidden), w2, b2)


def compress_mean(x: Tensor, blocks: Blocks, l: int, d: int, kernels: bool) -> Tensor:
    """The mean of each block: x [n, h, e] -> [m, h, e]. It is linear too: the kernel reads blocks without copies."""
    if not kernels:
        return reference.compress_mean(x, blocks.first, l)
    one = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    return _block_linear(x, one.repeat(1, l), blocks, l, d) / l


def _block_linear(x: Tensor, w: Tensor, blocks: Blocks, l: int, d: int) -> Tensor:
    from nsa.compress import block_linear  # only where kernels run is triton sure to be there

    return block_linear(x, w, blocks.first, *blocks.starts, l, d)


class NSACore(nn.Module):
    """Native sparse attention given the projections of one layer's local heads; holds the compression weights."""

    def __init__(self, sizes: Attention, qk_dim: int, v_dim: int):
        super().__init__()
        self.sizes = sizes
        self.compresses = Branch.cmp in sizes.branches
        self.scores = Branch.slc in sizes.branches
        # Given rotated queries, compressed keys, gates and cu_seqlens of a pass, to look at.
        self.observe: Callable[[Tensor, Tensor | None, Tensor, Tensor], None] | None = None
        if self.compresses and sizes.compression is Compression.mlp:
            self.phi_k = Phi(sizes.l, sizes.d, qk_dim, sizes.phi_hidden or qk_dim)
            self.phi_v = Phi(sizes.l, sizes.d, v_dim, sizes.phi_hidden or v_dim)

    def forward(
        self,
        q: Tensor,
        kv: dict[str, tuple[Tensor, Tensor]],
        gates: Tensor,
        documents: Documents,
        rotate: Callable[[Tensor, Tensor], Tensor],
        share: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> Tensor:
        """o [n, h, dv] from unrotated projections: q [n, h, dk], kv {branch: ([n, h_kv, dk], [n, h_kv, dv])}.

        gates [n, h, branches] in (0, 1). `rotate(x, positions)` applies RoPE at in-document positions. Keys are
        compressed before they are rotated, and a compressed key is rotated at its block's first position. `share` is
        applied to each weight before use: heads may be spread over ranks.
        """
        places, blocks = documents.positions, documents.blocks(self.sizes.l, self.sizes.d)
        k_cmp, v_cmp = self._compress(q, kv, blocks, rotate, share)
        rotated = {name: (rotate(k, places), v) for name, (k, v) in kv.items() if name != "cmp"}
        q = rotate(q, places)
        if self.observe is not None:
            self.observe(q, k_cmp, gates, documents.cu_seqlens)
        return nsa_attention(q, rotated, k_cmp, v_cmp, gates, documents.cu_seqlens, self.sizes, blocks.starts)

    def compress(
        self, k: Tensor, v: Tensor, blocks: Blocks, share: Callable[[Tensor], Tensor], kernels: bool
    ) -> tuple[Tensor, Tensor]:
        """By the learnable compression: k [n, h_kv, dk], v [n, h_kv, dv] -> [m, h_kv, dk], [m, h_kv, dv]."""
        if not kernels or len(self.phi_k.b1) > UNITS or len(self.phi_v.b1) > UNITS:
            return self.phi_k(k, blocks, share, kernels), self.phi_v(v, blocks, share, kernels)
        from nsa.compress import compress

        phis = ([share(p) for p in phi.parameters()] for phi in (self.phi_k, self.phi_v))
        return compress(k, v, *phis, blocks.first, *blocks.starts, self.sizes.l, self.sizes.d)

    def _compress(self, q, kv, blocks, rotate, share) -> tuple[Tensor | None, Tensor | None]:
        """Compressed and rotated keys [m, h_kv, dk], compressed values [m, h_kv, dv]; None for what no branch needs.

        Without a cmp branch the blocks are scored by the mean of the keys that will be selected.
        """
        if not (self.compresses or self.scores):
            return None, None
        a = self.sizes
        k, v = kv["cmp" if self.compresses else "slc"]
        kernels = uses_kernels(q, v.shape[2], k.shape[1], a)
        if self.compresses and a.compression is Compression.mlp:
            k_cmp, v_cmp = self.compress(k, v, blocks, share, kernels)
        else:
            k_cmp = compress_mean(k, blocks, a.l, a.d, kernels)
            v_cmp = compress_mean(v, blocks, a.l, a.d, kernels) if self.compresses else None
        return rotate(k_cmp, blocks.positions), v_cmp
