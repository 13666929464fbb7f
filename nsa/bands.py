"""Which keys a branch sees besides the chosen blocks, and how kernels walk over them.

Key j of a document is seen by the query at position t if `(t // A - N + 1) * A <= j < (t + 1 - L) // D + 1`: a key
stands for L tokens, one for every D, that must all lie at or before t; and for those that go back no further than the
N-th aligned run of A tokens, t's own included. The first ALL tokens see whatever lies before them: selection, when
there are no more blocks than it takes, takes all of them, and a band of so many is cheaper than choices.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from configs.schema import Attention
from nsa.memory import everything

FAR = tl.constexpr(1 << 30)
SHORT_BAND = tl.constexpr(4)  # tiles of keys


@dataclass(frozen=True)
class Band:
    """Which keys a query sees, in the module's letters."""

    L: int = 1
    D: int = 1
    A: int = 1
    N: int = FAR.value
    ALL: int = 0

    @property
    def keyed_by_block(self) -> bool:
        """Keys are compression blocks, not tokens: they alone are seen back to the start of a document."""
        return FAR.value == self.N

    def run(self, group: int) -> int:
        """Heads whose statistics lie side by side, token by token: [h / run, n, run]."""
        return 1 if self.keyed_by_block else group


def bands(sizes: Attention) -> dict[str, Band]:
    """The band of each branch; of slc the local blocks."""
    return {
        "cmp": Band(L=sizes.l, D=sizes.d),
        "slc": Band(A=sizes.l_slc, N=sizes.local, ALL=everything(sizes)),
        "win": Band(N=min(sizes.w, FAR.value - 1)),
    }


@triton.jit
def lowest(t, A: tl.constexpr, N: tl.constexpr, ALL: tl.constexpr):
    """The first key that the query at t sees."""
    return tl.where(t < ALL, 0, tl.maximum((t // A - (N - 1)) * A, 0))


@triton.jit
def beyond(t, L: tl.constexpr, D: tl.constexpr):
    """The first key that it sees no more."""
    return tl.maximum(t + 1 + D - L, 0) // D


@triton.jit
def tile_at(i, sinks, first, lefts, inner, BN: tl.constexpr):
    """The first key of tile i, where tiles come from three places: the start, the band's left edge, and `inner` on."""
    at = tl.where(i < sinks + lefts, first + (i - sinks) * BN, inner + (i - sinks - lefts) * BN)
    return tl.where(i < sinks, i * BN, at)


@triton.jit
def edges(low, low_last, high, high_last, short, BN: tl.constexpr):
    """Tiles of BN keys for queries of which the first sees the keys [low, high) and the last [low_last, high_last):
    tiles on the left that not all see, the first key after them, tiles that all see, the first key after these, tiles
    on the right.

    A short band is all edge: to start another loop takes longer than its masks do.
    """
    left = tl.minimum(low + (low_last - low + BN - 1) // BN * BN, high_last)
    whole = tl.where(short, 0, tl.maximum((high - left) // BN, 0))
    inner = left + whole * BN
    return (left - low + BN - 1) // BN, left, whole, inner, tl.maximum(high_last - inner + BN - 1, 0) // BN
