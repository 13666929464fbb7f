"""Named shapes that tests and benchmark share: what is timed is what is proved. Small ones are hostile on purpose."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from configs.schema import Attention, Branch


@dataclass(frozen=True)
class Case:
    """One attention problem: documents of these lengths, packed."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    qk_dim: int = 8
    v_dim: int = 8
    sizes: Attention = field(default_factory=lambda: Attention(l=8, d=4, l_slc=16, n=4, w=12))

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """[documents + 1], host memory."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @property
    def blocks(self) -> int:
        """Compression blocks of all documents."""
        return sum(max(0, (t - self.sizes.l) // self.sizes.d + 1) for t in self.lengths)


def _sizes(**sizes) -> Attention:
    return Attention(**{"l": 8, "d": 4, "l_slc": 16, "n": 4, "w": 12, **sizes})


CASES = [
    Case("plain", (96,)),
    Case("one token", (1,)),
    Case("shorter than a block", (7,)),
    Case("exactly a block", (8,)),
    Case("odd length", (101,)),
    Case("packed", (33, 1, 50, 7, 64)),
    Case("empty document", (20, 0, 30)),
    Case("no groups", (70,), heads=3, kv_heads=3),
    Case("one KV head", (70,), heads=16, kv_heads=1),
    Case("wide keys", (60, 25), qk_dim=12, v_dim=6),
    Case("no overlap", (90,), sizes=_sizes(l=4, d=4)),
    Case("equal blocks", (90,), sizes=_sizes(l=16, d=16)),
    Case("much overlap", (90,), sizes=_sizes(l=16, d=2)),
    Case("blocks for all", (60,), sizes=_sizes(n=16)),
    Case("only forced", (100,), sizes=_sizes(n=3)),
    Case("more forced", (120,), sizes=_sizes(n=6, initial=2, local=3)),
    Case("none initial", (100,), sizes=_sizes(initial=0, local=1)),
    Case("window of one", (40,), sizes=_sizes(w=1)),
    Case("window beyond", (40, 20), sizes=_sizes(w=64)),
    Case("blocks of one token", (11, 2), sizes=_sizes(l=1, d=1)),
    Case("one query a tile", (2, 1), heads=64, kv_heads=1),
    Case("no block to score by", (7, 3), sizes=_sizes(branches=[Branch.slc])),
]


def fitted(case: Case) -> Case:
    """The same at the least widths that the kernels take on a GPU."""
    return replace(case, qk_dim=48 if case.qk_dim > case.v_dim else 16, v_dim=16)


PACKED = (2040, 1, 33, 517, 64)  # tokens of odd documents; the first sees more blocks than any of these takes
WIDTHS = ((64, 64), (128, 128), (192, 128))
GROUPS = (1, 2, 4, 8, 16)
WHOLE = [
    Case(f"{qk}/{v} group {group}", PACKED, max(2, group), max(2, group) // group, qk, v, Attention())
    for qk, v in WIDTHS
    for group in GROUPS
]
LARGE = [  # groups whose heads are fetched together
    Case(f"{qk}/{v} group {group}, two KV heads", PACKED, 2 * group, 2, qk, v, Attention(n=n))
    for (qk, v), group, n in zip((*WIDTHS, (128, 64)), (64, 32, 16, 16), (16, 6, 30, 16))
]
CHANGES = [
    {"n": 2, "initial": 0},
    {"n": 3},
    {"n": 30},
    {"n": 12, "initial": 2, "local": 4},
    {"initial": 0, "local": 1},
    {"w": 1},
    {"w": 100},
    {"w": 4096},
    {"l": 16},
    {"l": 16, "d": 8},
    {"l": 64},
    {"l": 64, "d": 32},
    {"l_slc": 32},
    {"l_slc": 128, "n": 8},
    {"branches": [Branch.cmp]},
    {"branches": [Branch.slc]},
    {"branches": [Branch.win, Branch.cmp]},
]
ABLATIONS = [Case(" ".join(f"{k}={v}" for k, v in c.items()), PACKED, 8, 2, 64, 64, Attention(**c)) for c in CHANGES]


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
    """Random leaves that want gradients: q, gates, and keys and values of each branch."""
    generator = torch.Generator().manual_seed(seed)
    n, m, h, g = case.tokens, case.blocks, case.heads, case.kv_heads
    shapes = {"q": (n, h, case.qk_dim), "gates": (n, h, 3)}
    for name, rows in (("cmp", m), ("slc", n), ("win", n)):
        shapes |= {f"k_{name}": (rows, g, case.qk_dim), f"v_{name}": (rows, g, case.v_dim)}
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    made["gates"] = made["gates"].sigmoid()
    return {name: x.to(device, dtype).requires_grad_() for name, x in made.items()}
