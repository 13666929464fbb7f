"""Bytes of NSA's kernels: what they keep of a layer for backward, and what they hold only while they run.

Nothing here imports torch or triton, so that a plan can be made on any machine; so the kernels (nsa/picked.py) take
their sizes from here. Forward holds less beyond what it keeps than backward does.
"""

from dataclasses import dataclass

from configs.schema import Attention, Branch, Compression

# Tokens of a chunk, a multiple of 16 so that no tile of queries is in two: with more of them more is held at once, with
# fewer backward has more parts of dk and dv. And pairs of a run of backward.
CHUNK, BACK_RUN = 8192, 256
UNITS = 256  # hidden units of the compression MLP that one kernel takes


@dataclass(frozen=True)
class Shape:
    """Of the local heads of one layer in one micro-batch."""

    tokens: int
    length: int  # of each of its documents
    blocks: int  # compression blocks of all of them
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    width: int  # bytes of an element


def everything(a: Attention) -> int:
    """First tokens of a document that see no more blocks than selection takes."""
    return a.n * a.l_slc


def kept(s: Shape, a: Attention) -> dict[str, int]:
    """By kind, from the projections to the outputs of the branches; not the input of the layer, nor the gated sum, nor
    the angles of RoPE."""
    branches, rotated = set(a.branches), [b for b in (Branch.slc, Branch.win) if b in a.branches]
    pairs = 1 if a.shared_kv else len(a.branches)
    row = s.width * s.tokens
    compressed = s.width * s.blocks * s.kv_heads if branches & {Branch.cmp, Branch.slc} else 0
    keys = row * s.kv_heads * s.qk_dim * (pairs * (compressed > 0) + len(rotated))
    values = row * s.kv_heads * s.v_dim * pairs
    mlp = Branch.cmp in branches and a.compression is Compression.mlp
    hidden = sum(a.phi_hidden or width for width in (s.qk_dim, s.v_dim)) if mlp else 0
    hidden *= 2 if (a.phi_hidden or 0) > UNITS else 1  # where two kernels share the work, after the GELU too
    means = [] if mlp or not compressed else [s.qk_dim] + [s.v_dim] * (Branch.cmp in branches)
    blocks = s.qk_dim + s.v_dim * (Branch.cmp in branches) + hidden
    picks = 4 * s.tokens * s.kv_heads * (a.n - a.local) * (Branch.slc in branches)
    return {
        "queries": row * s.heads * s.qk_dim,
        "keys and values": keys + values,
        "compressed blocks": compressed * blocks + s.width * a.l * sum(e * e for e in means),
        "gates": row * s.heads * len(branches),
        "outputs of branches": (row * s.heads * s.v_dim + 4 * s.tokens * s.heads) * len(branches),
        "chosen blocks": picks,
    }


def backward(s: Shape, a: Attention) -> int:
    """The most that backward holds at a time beyond what was kept, its own gradients included."""
    row, statistics = s.width * s.tokens, 2 * 4 * s.tokens * s.heads * len(a.branches)
    queries = row * (s.heads * (s.qk_dim + s.v_dim) + s.heads * len(a.branches))  # of q, of the output, of the gates
    both = s.qk_dim + s.v_dim
    keys = row * s.kv_heads * both * len(a.branches)
    split = 4 * s.blocks * s.heads * both * (Branch.cmp in a.branches)  # each head of a group has its own sum
    return statistics + queries + keys + split + _chosen(s, a)


def _chosen(s: Shape, a: Attention) -> int:
    """Of the gradients of chosen blocks: parts of a chunk of queries, sums in fp32, the pairs in order. Nothing is
    chosen where no document has more blocks than selection takes."""
    picks = (a.n - a.local) * (Branch.slc in a.branches and s.length > everything(a))
    size, both = min(CHUNK, s.tokens), s.qk_dim + s.v_dim
    slots = -(-size * picks // BACK_RUN) + s.tokens // a.l_slc
    parts = s.width * size * picks * s.heads * s.qk_dim + 4 * s.kv_heads * slots * a.l_slc * both
    pairs = (4 + 4 + 8 + 4) * s.tokens * s.kv_heads * picks  # keys, sorted keys, places as int64 and int32
    return parts + pairs + 4 * s.tokens * s.kv_heads * both if picks else 0
