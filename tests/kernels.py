"""How NSA's kernels are compared with its definition; nothing here knows how they work.

Low precision may flip a choice between blocks that score nearly alike. So which blocks were chosen is read off the
output and judged by score; outputs and gradients are compared with the definition given that choice.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.schema import Attention, Backend, Branch
from nsa import Documents, fused, nsa_attention, reference, tiles
from nsa.cases import Case, make_inputs

FLOOR = {torch.bfloat16: 1e-3, torch.float16: 1e-4, torch.float32: 2e-6}  # relative errors that are none
NEAR = 1e-4  # scores that differ by less, relatively, may trade places
CPU = torch.device("cpu")
SIZES = Attention(l=8, d=4, l_slc=16, n=3, w=12)
SMALL = Case("small", (50, 9), heads=2, kv_heads=1, sizes=SIZES)
interpreted = pytest.mark.skipif(not fused.INTERPRETED, reason="the interpreter is off where there is a GPU")


def attend(case: Case, x: dict[str, Tensor], backend: Backend = Backend.triton) -> Tensor:
    """o [n, h, dv] of `nsa_attention`."""
    sizes = replace(case.sizes, backend=backend)
    kv = {b.value: (x[f"k_{b.value}"], x[f"v_{b.value}"]) for b in sizes.branches if b is not Branch.cmp}
    gates = x["gates"][..., : len(sizes.branches)]
    return nsa_attention(x["q"], kv, x["k_cmp"], x["v_cmp"], gates, case.cu_seqlens, sizes)


def packed(case: Case, device: str = "cpu") -> tiles.Documents:
    """The documents of a case as kernels take them."""
    starts = Documents.of(case.cu_seqlens, torch.device(device)).blocks(case.sizes.l, case.sizes.d).starts
    return tiles.Documents.of(case.cu_seqlens, starts)


def results(case: Case, x: dict[str, Tensor], do: Tensor, backend: Backend = Backend.triton) -> dict[str, Tensor]:
    """The output "o" and the gradient of each input, by its name."""
    o = attend(case, x, backend)
    gradients = torch.autograd.grad(o, list(x.values()), do.to(o.dtype), allow_unused=True)
    return {"o": o.detach(), **{n: torch.zeros_like(x[n]) if g is None else g for n, g in zip(x, gradients)}}


def leaves(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies that want gradients."""
    return {name: t.detach().to(dtype).requires_grad_() for name, t in x.items()}


def selection(case: Case, x: dict[str, Tensor], backend: Backend = Backend.triton) -> Tensor:
    """Which blocks of its document a query reads, bool [n, h_kv, dv]; a document may have dv blocks at most.

    Where a value says which block it is of, an output says how much of it comes from which.
    """
    a = case.sizes
    assert max(case.lengths) <= case.v_dim * a.l_slc
    place = torch.cat([torch.arange(n) for n in case.lengths]) // a.l_slc
    named = F.one_hot(place, case.v_dim)[:, None].expand(-1, case.kv_heads, -1).to(x["q"])
    gates = torch.zeros_like(x["gates"])
    gates[..., a.branches.index(Branch.slc)] = 1
    with torch.no_grad():
        share = attend(case, {**x, "v_slc": named, "gates": gates}, backend)
    read = share.unflatten(1, (case.kv_heads, -1)) > 0
    assert (read == read[:, :, :1]).all(), "the heads of a group read different blocks"
    return read[:, :, 0]


def misjudged(case: Case, x: dict[str, Tensor], read: Tensor) -> Iterator[str]:
    """What is wrong with a selection, by the scores of Eq. 9 and 10 in fp64."""
    a, blocks = case.sizes, reference.block_starts(case.cu_seqlens, case.sizes.l, case.sizes.d)[0].tolist()
    for i, (s, e) in enumerate(zip(case.cu_seqlens.tolist(), case.cu_seqlens.tolist()[1:])):
        if s == e:
            continue
        q, k = x["q"][s:e].detach().double(), x["k_cmp"][blocks[i] : blocks[i + 1]].detach().double()
        p = reference.compressed(q, k, k, 0, a.l, a.d)[1]
        scores = reference.importance(p, e - s, a.l, a.d, a.l_slc).transpose(0, 1)  # [c, h_kv, blocks]
        count = scores.shape[2]
        taken, rest = read[s:e, :, :count], read[s:e, :, count:]
        own = torch.arange(e - s, device=q.device)[:, None, None] // a.l_slc
        block = torch.arange(count, device=q.device)
        seen, forced = block <= own, (block < a.initial) | (block > own - a.local)
        wanted = (own + 1).clamp(max=a.n).expand(-1, case.kv_heads, -1)[..., 0]
        least = scores.masked_fill(~taken | forced, torch.inf).amin(2)
        most = scores.masked_fill(taken | ~seen, -torch.inf).amax(2)
        if rest.any() or (taken & ~seen).any():
            yield f"document {i}: a block that the query does not see"
        if (forced & seen & ~taken).any():
            yield f"document {i}: a forced block was left out"
        if (taken.sum(2) != wanted).any():
            yield f"document {i}: {int((taken.sum(2) != wanted).sum())} queries with too few blocks or too many"
        if (least < most - NEAR * most.abs()).any():
            yield f"document {i}: {int((least < most - NEAR * most.abs()).sum())} queries left a better block out"


@contextlib.contextmanager
def given(read: Tensor | None) -> Iterator[None]:
    """The definition computes in its inputs' dtype, whichever, and takes the blocks of `read` instead of its own."""
    row = 0

    def choose(scores: Tensor, start: int, a) -> Tensor:
        nonlocal row
        mine = read[row : row + scores.shape[1]].transpose(0, 1)
        row += scores.shape[1]
        count = mine.shape[2]
        index = torch.where(mine, torch.arange(count, device=mine.device), count).sort(-1).values[..., : a.n]
        return index.masked_fill(index == count, -1)

    with mock.patch.multiple(reference, choose=choose, _wide=lambda t: t, KEEP=1 << 30):
        yield


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """Memory that nobody has written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def faults(case: Case, dtype: torch.dtype, device: str) -> list[str]:
    """What is wrong with the kernels on this case: selection, output, each gradient, and whether a second run agrees.

    An error may be twice that of plain torch in the same precision, both against fp64.
    """
    x = make_inputs(case, dtype, device)
    do = torch.randn(case.tokens, case.heads, case.v_dim, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    read, wrong = None, []
    if Branch.slc in case.sizes.branches:
        read = selection(case, x)
        wrong += misjudged(case, x, read)
    ours = results(case, x, do)
    with filled():
        again = results(case, x, do)
    wrong += [f"{name}: a second run differs" for name in ours if not torch.equal(ours[name], again[name])]
    with given(read):
        plain = results(case, leaves(x, dtype), do, Backend.torch)
    with given(read):
        exact = results(case, leaves(x, torch.float64), do.double(), Backend.torch)
    return wrong + [why for name in ours if (why := differs(name, ours[name], plain[name], exact[name], do.double()))]


def differs(name: str, ours: Tensor, plain: Tensor, exact: Tensor, do: Tensor) -> str | None:
    """Why `ours` is too far from `exact`, if it is: as a whole, or in the worst place.

    Where terms cancel to a gradient of zero (a softmax over one key), rounding is measured by what goes in.
    """
    if not exact.numel():
        return None
    for kind, size in (("norm", torch.linalg.vector_norm), ("largest", lambda t: t.abs().max())):
        error, allowed = size(ours.double() - exact), size(plain.double() - exact)
        scale = size(exact) if size(exact) > 1e-9 * size(do) else 4 * size(do)
        if not error <= 2 * allowed + FLOOR[ours.dtype] * scale:
            return f"{name}: {kind} error {error:.2e}, of plain torch {allowed:.2e}, of {size(exact):.2e}"
    return None
