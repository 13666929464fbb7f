"""The kernels of one forward and backward, each alone on the tensors that it gets in the whole: for the benchmark."""

from collections.abc import Callable

import torch
from torch import Tensor

import nsa
from nsa import band, band_backward, gates, picked, score, tiles, visits
from nsa.bands import bands
from nsa.beside import Beside
from nsa.core import NSACore

Calls = dict[str, Callable[[], object]]


def parts(core: NSACore, x: dict[str, Tensor], do: Tensor, documents: nsa.Documents) -> tuple[dict[str, Calls], float]:
    """The launches of forward ("fwd") and backward ("bwd") by name, and pieces of them alone ("of these").

    Also how many of a query's chosen blocks its neighbour chose too. x holds q, gates, and k and v of cmp, slc and win
    as the projections give them; do [n, h, dv].
    """
    a, q, branch_gates = core.sizes, x["q"].detach(), x["gates"].detach()
    blocks, same = documents.blocks(a.l, a.d), lambda weight: weight
    found = tiles.Documents.of(documents.cu_seqlens, blocks.starts)

    def compress() -> tuple[Tensor, Tensor]:
        return core.compress(x["k_cmp"], x["v_cmp"], blocks, same, True)

    compressed = compress()
    kv = {"cmp": tuple(t.detach() for t in compressed)}
    kv |= {name: (x[f"k_{name}"].detach(), x[f"v_{name}"].detach()) for name in ("slc", "win")}
    out = band.forward(q, kv, found, a)
    outputs, lses = {name: o for name, (o, _) in out.items()}, [lse for _, lse in out.values()]
    chosen = score.choose(q, kv["cmp"][0], out["cmp"][1], found, a)
    pick = (outputs, out["slc"][1], branch_gates, chosen, found, a)  # adds to outputs call after call, which hurts none
    picked.forward(q, *kv["slc"], *pick)
    _, *pairs = gates.products(do, list(outputs.values()), lses, branch_gates)
    statistics = dict(zip(kv, zip(*pairs)))
    dq, sums, group = torch.zeros_like(q), {}, q.shape[1] // kv["slc"][0].shape[1]
    for name, pair in kv.items():
        dtype = torch.float32 if name == "slc" else q.dtype
        sums[name] = band_backward.room(*pair, group, bands(a)[name], dtype)
    to_blocks = (dq, *(t[0].zero_() for t in sums["slc"]))
    leaves, back = [x["k_cmp"], x["v_cmp"], *core.parameters()], [torch.randn_like(t) for t in compressed]

    def queries(names: list[str]) -> None:
        given, found_for = ({name: values[name] for name in names} for values in (kv, statistics))
        band_backward.queries(q, given, do, found_for, dq, found, a)

    def chosen_blocks() -> None:
        with Beside(q.device) as nothing:
            pass
        picked.backward(q, *kv["slc"], do, *statistics["slc"], *to_blocks, chosen, found, a, nothing)

    def keys(name: str) -> list[Tensor]:
        band_backward.keys(q, *kv[name], do, *statistics[name], *sums[name], found, bands(a)[name])
        return [band_backward.total(t).to(q.dtype) for t in sums[name]]

    forward: Calls = {
        "compression": compress,
        "compressed, near and window": lambda: band.forward(q, kv, found, a),
        "scores and top-k": lambda: score.choose(q, kv["cmp"][0], out["cmp"][1], found, a),
        "chosen, gates": lambda: picked.forward(q, *kv["slc"], *pick),
    }
    backward: Calls = {
        "gates": lambda: gates.products(do, list(outputs.values()), lses, branch_gates),
        "queries of compressed, near and window": lambda: queries(list(kv)),
        "keys of compressed": lambda: keys("cmp"),
        "keys of near": lambda: keys("slc"),
        "keys of window": lambda: keys("win"),
        "chosen": chosen_blocks,
        "compression": lambda: torch.autograd.grad(compressed, leaves, back, retain_graph=True),
    }
    inside: Calls = {
        "pairs": lambda: picked.sort(chosen, picked.CHUNK, found.tiles(a.l_slc)),
        "visits": lambda: visits.gather(chosen, found, a.initial, a.l_slc),
    }
    for name, label in (("cmp", "compressed"), ("slc", "near"), ("win", "window")):
        inside |= {
            f"{label} fwd": lambda n=name: band.forward(q, {n: kv[n]}, found, a),
            f"{label} queries": lambda n=name: queries([n]),
        }
    return {"fwd": forward, "bwd": backward, "of these": inside}, _overlap(chosen, found.tiles(a.l_slc))


def _overlap(chosen: Tensor, blocks: int) -> float:
    """The share of the chosen blocks (first ones included, local ones not) that the query before chose too."""
    real, block = chosen != score.NONE, chosen % blocks
    found = 0
    for ours, theirs in zip(block[1:].split(4096), block[:-1].split(4096)):
        found = found + (ours[..., None] == theirs[..., None, :]).any(-1).sum(0)
    # A query early in its document has fewer picks than there is room for; all of those are its neighbour's.
    return float((found.sum() - (~real[1:]).sum()) / real[1:].sum().clamp(min=1))
