"""The Triton backend: the kernels joined into one operator with a gradient, for eager mode and torch.compile."""

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, library

from configs.kernels import INTERPRETED, misfit
from configs.schema import Attention, Branch
from nsa import band, band_backward, gates, picked, score, tiles
from nsa.bands import bands
from nsa.beside import Beside
from nsa.documents import Documents, check_blocks, check_documents
from nsa.memory import everything
from nsa.tiles import halves, rows

NAMES = [b.value for b in Branch]


def unfit(q: Tensor, v_dim: int, kv_heads: int, sizes: Attention) -> str | None:
    """Why the kernels cannot take this, or None."""
    if not (q.is_cuda or INTERPRETED):
        return f"q is on the {q.device.type}, and they run on a GPU"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"q is {q.dtype}; they take bfloat16, float16 and float32"
    return misfit(q.shape[2], v_dim, q.shape[1] // kv_heads, sizes, q.dtype is torch.float32)


def _sizes(numbers: Sequence[int]) -> tuple[Attention, list[str]]:
    l, d, l_slc, n, initial, local, w, *branches = numbers
    sizes = Attention(l=l, d=d, l_slc=l_slc, n=n, initial=initial, local=local, w=w)
    return sizes, [NAMES[b] for b in branches]


def _documents(cu_seqlens: Tensor, starts: Tensor | None, sizes: Attention, device: torch.device) -> tiles.Documents:
    if starts is None:
        starts = Documents.of(cu_seqlens, device).blocks(sizes.l, sizes.d).starts
    return tiles.Documents.of(cu_seqlens, starts)


@library.custom_op("sparsetron::nsa", mutates_args=())
def _nsa(
    q: Tensor, k_cmp: Optional[Tensor], v_cmp: Optional[Tensor], k_slc: Optional[Tensor], v_slc: Optional[Tensor],
    k_win: Optional[Tensor], v_win: Optional[Tensor], gates_: Tensor, cu_seqlens: Tensor, starts: Optional[Tensor],
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gated sum, and for backward output and log-sum-exp of cmp, slc and win, and the chosen blocks."""
    sizes, branches = _sizes(numbers)
    check_documents(cu_seqlens, len(q))
    if k_cmp is not None:
        check_blocks(k_cmp, cu_seqlens, sizes.l, sizes.d)
    documents = _documents(cu_seqlens, starts, sizes, q.device)
    q = rows(q)
    kv = {name: (rows(k), rows(v)) for name, k, v in _given(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)}
    out = {name: (q.new_empty(0), q.new_empty(0)) for name in NAMES}
    out |= band.forward(q, {name: kv[name] for name in branches}, documents, sizes)
    outputs = {name: out[name][0] for name in branches}
    if not _chooses(branches, documents, sizes):
        o = gates.gated_sum(list(outputs.values()), gates_.contiguous())
        return o, *out["cmp"], *out["slc"], *out["win"], _choices(q, kv, branches, sizes).fill_(score.NONE)
    k, lse = kv["cmp"][0] if "cmp" in branches else rows(k_cmp), out["cmp"][1]
    if "cmp" not in branches:  # blocks are only scored
        lse = band.forward(q, {"cmp": (k, k[..., : halves(k.shape[2])[0]])}, documents, sizes)["cmp"][1]
    chosen = score.choose(q, k, lse, documents, sizes)
    o = picked.forward(q, *kv["slc"], outputs, out["slc"][1], gates_.contiguous(), chosen, documents, sizes)
    return o, *out["cmp"], *out["slc"], *out["win"], chosen


def _chooses(branches: list[str], documents: tiles.Documents, sizes: Attention) -> bool:
    """Whether any query sees more blocks than the bands have."""
    return "slc" in branches and sizes.n > sizes.local and documents.longest > everything(sizes)


def _choices(q: Tensor, kv: dict[str, tuple[Tensor, Tensor]], branches: list[str], sizes: Attention) -> Tensor:
    """Of the shape of `score.choose`, empty where that has nothing to choose."""
    picks = sizes.n - sizes.local
    shape = (len(q), kv["slc"][0].shape[1], picks) if "slc" in branches and picks else (0,)
    return q.new_empty(shape, dtype=torch.int32)


def _given(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win):
    three = (("cmp", k_cmp, v_cmp), ("slc", k_slc, v_slc), ("win", k_win, v_win))
    return [(name, k, v) for name, k, v in three if k is not None and v is not None]


@_nsa.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates_, cu_seqlens, starts, numbers):
    sizes, branches = _sizes(numbers)
    n, heads, _ = q.shape
    kv = {name: (k, v) for name, k, v in _given(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)}
    o = q.new_empty(n, heads, kv[branches[0]][1].shape[2])
    out = []
    for name in NAMES:
        if name in branches:
            run = bands(sizes)[name].run(heads // kv[name][0].shape[1])
            out += [torch.empty_like(o), q.new_empty(heads // run, n, run, dtype=torch.float32)]
        else:
            out += [q.new_empty(0), q.new_empty(0)]
    return o, *out, _choices(q, kv, branches, sizes)


@library.custom_op("sparsetron::nsa_backward", mutates_args=())
def _nsa_backward(
    do: Tensor, q: Tensor, k_cmp: Optional[Tensor], v_cmp: Optional[Tensor], k_slc: Optional[Tensor],
    v_slc: Optional[Tensor], k_win: Optional[Tensor], v_win: Optional[Tensor], gates_: Tensor, cu_seqlens: Tensor,
    starts: Optional[Tensor], saved: Sequence[Tensor], numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, of the six keys and values (empty for what is not there), and of the gates."""
    sizes, branches = _sizes(numbers)
    documents = _documents(cu_seqlens, starts, sizes, q.device)
    q, do = rows(q), rows(do)
    kv = {name: (rows(k), rows(v)) for name, k, v in _given(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)}
    out = {name: (saved[2 * i], saved[2 * i + 1]) for i, name in enumerate(NAMES)}
    outputs, lses = [out[name][0] for name in branches], [out[name][1] for name in branches]
    dgates, shifts, deltas = gates.products(do, outputs, lses, gates_.contiguous())
    statistics = {name: (shifts[c], deltas[c]) for c, name in enumerate(branches)}
    dq, sums = q.new_empty(q.shape), {}
    chosen = _chooses(branches, documents, sizes)
    for name in branches:
        k, v = kv[name]
        dtype = torch.float32 if chosen and name == "slc" else q.dtype
        sums[name] = band_backward.room(k, v, q.shape[1] // k.shape[1], bands(sizes)[name], dtype)

    def keys(name: str) -> None:
        args = (q, *kv[name], do, *statistics[name], *sums[name])
        band_backward.keys(*args, documents, bands(sizes)[name])

    near, rest = Beside(q.device), Beside(q.device)
    with near:
        given = {name: kv[name] for name in branches}
        band_backward.queries(q, given, do, statistics, dq, documents, sizes)
        if chosen:
            keys("slc")
    with rest:
        for name in branches:
            if name != "slc" or not chosen:
                keys(name)
    try:
        if chosen:
            dk, dv = sums["slc"]
            args = (q, *kv["slc"], do, *statistics["slc"], dq, dk[0], dv[0], saved[6], documents, sizes)
            picked.backward(*args, near)
    finally:
        rest.wait()  # for want of memory too: what is freed then is still written to
    grads = {name: (q.new_empty(0), q.new_empty(0)) for name in NAMES}
    grads |= {name: tuple(band_backward.total(x).to(q.dtype) for x in pair) for name, pair in sums.items()}
    return dq, *grads["cmp"], *grads["slc"], *grads["win"], dgates


@_nsa_backward.register_fake
def _(do, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates_, cu_seqlens, starts, saved, numbers):
    _, branches = _sizes(numbers)
    kv = {name: (k, v) for name, k, v in _given(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)}
    pairs = [kv[name] if name in branches else (q.new_empty(0),) * 2 for name in NAMES]
    return q.new_empty(q.shape), *(x.new_empty(x.shape) for pair in pairs for x in pair), gates_.new_empty(gates_.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.numbers = inputs
    _, *rest = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(*tensors, *rest)


def _backward(ctx, do, *_):
    kept = ctx.saved_tensors  # read once, as activation recomputation asks for
    tensors, saved = kept[:10], kept[10:]
    dq, *six, dgates = _nsa_backward(do, *tensors, list(saved), ctx.numbers)
    six = [g if x is not None and g.shape == x.shape else None for g, x in zip(six, tensors[1:7])]
    return dq, *six, dgates, None, None, None


_nsa.register_autograd(_backward, setup_context=_save)


def nsa(
    q: Tensor,
    kv: dict[str, tuple[Tensor, Tensor]],
    k_cmp: Tensor | None,
    v_cmp: Tensor | None,
    gates: Tensor,
    cu_seqlens: Tensor,
    a: Attention,
    starts: Tensor | None = None,
) -> Tensor:
    """Eq. 5 as `reference.nsa` computes it, by kernels; see `unfit` for what they take."""
    numbers = [a.l, a.d, a.l_slc, a.n, a.initial, a.local, a.w, *(NAMES.index(b.value) for b in a.branches)]
    six = (k_cmp, v_cmp, *kv.get("slc", (None, None)), *kv.get("win", (None, None)))
    return _nsa(q, *six, gates, cu_seqlens, starts, numbers)[0]
