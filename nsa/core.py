"""The part of an NSA layer between its projections: compression, rotation, attention of local heads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from configs.schema import Attention, Branch, Compression
from nsa import reference
from nsa.attention import check_backend, nsa_attention


class Phi(nn.Module):
    """The learnable compression of Eq. 7 for heads of width e; weights are created empty."""

    def __init__(self, l: int, e: int, hidden: int):
        super().__init__()
        self.pe = nn.Parameter(torch.empty(l, e))
        self.w1 = nn.Parameter(torch.empty(hidden, l * e))
        self.b1 = nn.Parameter(torch.empty(hidden))
        self.w2 = nn.Parameter(torch.empty(e, hidden))
        self.b2 = nn.Parameter(torch.empty(e))

    def forward(self, x: Tensor, first: Tensor, share: Callable[[Tensor], Tensor]) -> Tensor:
        """x [n, h, e] -> [m, h, e] for the blocks whose first tokens are `first` [m]."""
        weights = (share(p) for p in (self.pe, self.w1, self.b1, self.w2, self.b2))
        return reference.compress_mlp(x, first, *weights)


class NSACore(nn.Module):
    """Native sparse attention given the projections of one layer's local heads; holds the compression weights."""

    def __init__(self, sizes: Attention, qk_dim: int, v_dim: int):
        super().__init__()
        check_backend(sizes)  # before a run is made, not in its first step
        self.sizes = sizes
        self.compresses = Branch.cmp in sizes.branches
        self.scores = Branch.slc in sizes.branches
        if self.compresses and sizes.compression is Compression.mlp:
            self.phi_k = Phi(sizes.l, qk_dim, sizes.phi_hidden or qk_dim)
            self.phi_v = Phi(sizes.l, v_dim, sizes.phi_hidden or v_dim)

    def forward(
        self,
        q: Tensor,
        kv: dict[str, tuple[Tensor, Tensor]],
        gates: Tensor,
        cu_seqlens: Tensor,
        rotate: Callable[[Tensor, Tensor], Tensor],
        share: Callable[[Tensor], Tensor] = lambda weight: weight,
    ) -> Tensor:
        """o [n, h, dv] from unrotated projections: q [n, h, dk], kv {branch: ([n, h_kv, dk], [n, h_kv, dv])}.

        gates [n, h, branches] in (0, 1); cu_seqlens [documents + 1] in host memory. `rotate(x, positions)` applies RoPE
        at in-document positions. Keys are compressed before they are rotated, and a compressed key is rotated at its
        block's first position. `share` is applied to each weight before use: heads may be spread over ranks.
        """
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        places = torch.arange(len(q)) - starts.repeat_interleave(lengths)
        places = places.to(q.device, non_blocking=True)
        k_cmp, v_cmp = self._compress(kv, cu_seqlens, rotate, share)
        rotated = {name: (rotate(k, places), v) for name, (k, v) in kv.items() if name != "cmp"}
        return nsa_attention(rotate(q, places), rotated, k_cmp, v_cmp, gates, cu_seqlens, self.sizes)

    def _compress(self, kv, cu_seqlens, rotate, share) -> tuple[Tensor | None, Tensor | None]:
        """Compressed and rotated keys [m, h_kv, dk], compressed values [m, h_kv, dv]; None for what no branch needs.

        Without a cmp branch the blocks are scored by the mean of the keys that will be selected.
        """
        if not (self.compresses or self.scores):
            return None, None
        _, first, places = reference.block_starts(cu_seqlens, self.sizes.l, self.sizes.d)
        k, v = kv["cmp" if self.compresses else "slc"]
        places = places.to(k.device, non_blocking=True)
        if self.compresses and self.sizes.compression is Compression.mlp:
            return rotate(self.phi_k(k, first, share), places), self.phi_v(v, first, share)
        k_cmp = rotate(reference.compress_mean(k, first, self.sizes.l), places)
        return k_cmp, reference.compress_mean(v, first, self.sizes.l) if self.compresses else None
