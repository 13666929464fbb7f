"""Bytes of nsa/reference.py, which computes what the kernels do not take: see nsa/memory.py, whose functions these are
for a GPU that has to do without them.
"""

from configs.schema import Attention, Branch, Compression
from nsa.memory import Shape
from nsa.reference import CHUNKS, KEEP


def kept(s: Shape, a: Attention) -> dict[str, int]:
    """By kind, as `nsa.memory.kept`. Attention is in fp32; probabilities are kept of short documents only."""
    scored = bool({Branch.cmp, Branch.slc} & set(a.branches))
    both = s.qk_dim + s.v_dim * (Branch.cmp in a.branches)
    mlp = Branch.cmp in a.branches and a.compression is Compression.mlp
    hidden = 2 * sum(a.phi_hidden or width for width in (s.qk_dim, s.v_dim))  # before and after the GELU
    blocks = s.width * (a.l * both + hidden) * mlp + 4 * both  # copied from where they lie, and compressed
    short = s.length <= KEEP
    return {
        "queries": 0 if short else 4 * s.tokens * s.heads * s.qk_dim,
        "keys and values": 4 * s.tokens * s.kv_heads * (s.qk_dim + s.v_dim) * _rotated(a),
        "compressed blocks": s.blocks * s.kv_heads * blocks * scored,
        "gates": (s.width + 4) * s.tokens * s.heads * len(a.branches),
        "branches": s.tokens // s.length * sum(sum(_kept(s, a, *c).values()) for c in _chunks(s.length))
        if short
        else 0,
    }


def backward(s: Shape, a: Attention) -> int:
    """As `nsa.memory.backward`, at the chunk of queries that sees most. Branches end in the opposite order of `Branch`.

    What short documents kept becomes less from there on, by more than the sums of gradients in fp32 grow.
    """
    count, end = max(_chunks(s.length, last=2), key=lambda c: c[0] * c[1])
    chunk, scores = _kept(s, a, count, end), _scores(s, a, count, end)
    again = 0 if s.length <= KEEP else sum(chunk.values())
    left = {b: again - sum(size for other, size in chunk.items() if other > b) for b in chunk}
    most = max(left[b] + 2 * 4 * s.heads * scores[b] for b in chunk)
    inputs = 2 * s.heads * s.qk_dim + 2 * s.kv_heads * (s.qk_dim + s.v_dim) * _rotated(a)
    return most + 4 * s.tokens * (s.heads * s.v_dim + (inputs if again else 0))


def _rotated(a: Attention) -> int:
    """Branches with keys of tokens."""
    return sum(b is not Branch.cmp for b in a.branches)


def _chunks(length: int, last: int = 0) -> list[tuple[int, int]]:
    """(queries, keys up to the last of them) of a document: of all chunks, or of the last ones."""
    size = min(max(CHUNKS[0], length // 8), CHUNKS[1])
    return [(min(size, length - start), min(start + size, length)) for start in range(0, length, size)[-last:]]


def _scores(s: Shape, a: Attention, count: int, end: int) -> dict[int, int]:
    """Of a chunk and head, by the branch's place in their order."""
    keys = {Branch.cmp: s.blocks * s.length // s.tokens, Branch.slc: end, Branch.win: min(end, count + a.w - 1)}
    return {i: count * keys[b] for i, b in enumerate(Branch) if b in a.branches}


def _kept(s: Shape, a: Attention, count: int, end: int) -> dict[int, int]:
    """Of a chunk, by branch: probabilities in fp32, mask, queries, output."""
    rows = 4 * count * s.heads * (s.qk_dim + s.v_dim)
    masks = {i: s.kv_heads if b is Branch.slc else 1 for i, b in enumerate(Branch)}
    return {i: (4 * s.heads + masks[i]) * n + rows for i, n in _scores(s, a, count, end).items()}
