"""Weights and optimizer state by parameter name: what a rank holds of them, in files that any other layout can read.

ZeRO keeps a parameter as flat ranges over data-parallel ranks of the part that tensor parallelism leaves to a rank, and
pipeline stages keep whole layers. A checkpoint has one file a rank with its ranges, as safetensors (nothing in it is
code), and the place of each range in its parameter. Reading puts together what a range needs from whatever was written.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from parallel.mesh import Mesh
from parallel.tied import name_of

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # fp32 master and both moments of AdamW


@dataclass(frozen=True)
class Place:
    """A flat range of the part of a parameter that one tensor-parallel rank has."""

    name: str
    dim: Optional[int]  # that tensor parallelism cuts; None where each rank has the whole
    part: int  # of `parts`
    parts: int
    shape: tuple[int, ...]  # of the part
    start: int
    count: int


@dataclass(frozen=True)
class Piece:
    """What this rank holds: views, by kind, into the optimizer's flat fp32 tensors [count]."""

    place: Place
    views: dict[str, Tensor]


def held(module: nn.Module, mesh: Mesh, flat: list[dict[str, Tensor]]) -> list[Piece]:
    """The pieces of this rank under ZeRO 1, 2 or 3. All ranks' together are the model, replicated parts more than once.

    `flat` has the optimizer's tensors by group and kind.
    """
    out = []
    for own, p in module.named_parameters():
        name, dim = name_of(own, p), getattr(p, "shard_dim", None)
        part, parts = (0, 1) if dim is None else (mesh.tp.rank, mesh.tp.size)
        shape, start, group, first, count = _zero3(p, mesh) if hasattr(p, "ds_tensor") else _zero1(p)
        if count:
            views = {kind: flat[group][kind].narrow(0, first, count) for kind in KINDS}
            out.append(Piece(Place(name, dim, part, parts, shape, start, count), views))
    return out


def _zero1(p: Any) -> tuple[tuple[int, ...], int, int, int, int]:
    """(shape, start in it, group, start in the flat tensors, count) of what ZeRO 1 or 2 updates here of a parameter."""
    if p._hp_mapping is None:
        return tuple(p.shape), 0, 0, 0, 0
    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
    return tuple(p.shape), here.start, p._hp_mapping.param_group_index, there.start, there.numel


def _zero3(p: Any, mesh: Mesh) -> tuple[tuple[int, ...], int, int, int, int]:
    """The same under ZeRO 3, which cuts each parameter evenly; what fills the last parts up belongs to nobody."""
    group, first, size = p._z3_optimizer.grad_position[p._z3_optimizer.get_param_id(p)]
    start = mesh.dp.rank * size
    return tuple(p.ds_shape), start, group, first, max(0, min(size, p.ds_numel - start))


@dataclass(frozen=True)
class Snapshot:
    """What this rank writes of one step, in host memory that training does not touch."""

    pieces: list[Piece]
    updates: int  # AdamW's counter

    @property
    def bytes(self) -> int:
        return sum(view.nbytes for piece in self.pieces for view in piece.views.values())


def write(folder: Path, snapshot: Snapshot, rank: int) -> Path:
    """Write this rank's file and return its path."""
    tensors = {f"{k}/{p.place.name}": v for p in snapshot.pieces for k, v in p.views.items()}
    # One entry: several would come in another order each time, and equal states would not be equal files.
    header = {"pieces": json.dumps({"updates": snapshot.updates, "places": [vars(p.place) for p in snapshot.pieces]})}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{rank:05d}.safetensors"
    save_file(tensors, path, header)
    path.chmod(0o640)  # it would be for its user alone
    return path


class Reader:
    """The pieces of a checkpoint, or the whole weights of an exported model, by parameter name."""

    def __init__(self, folder: Path):
        self.files: list[Any] = []
        self.places: dict[str, list[tuple[int, Place]]] = {}  # with the number of the file
        self.updates: Optional[int] = None  # None: weights alone
        for path in sorted(folder.glob("*.safetensors")):
            self._add(safe_open(path, "pt"))

    def _add(self, file: Any) -> None:
        header = file.metadata() or {}
        if "pieces" in header:
            listed = json.loads(header["pieces"])
            self.updates = listed["updates"]
            places = [Place(**{**p, "shape": tuple(p["shape"])}) for p in listed["places"]]
        else:
            whole = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            places = [Place(name, None, 0, 1, s, 0, torch.Size(s).numel()) for name, s in whole.items()]
        for place in places:
            self.places.setdefault(place.name, []).append((len(self.files), place))
        self.files.append(file)

    def whole(self, name: str, kind: str = "weight") -> Tensor:
        """A whole parameter, or a moment of it. Raises KeyError if it is not there, ValueError if not all of it is."""
        first = self.places[name][0][1]
        size = torch.Size(first.shape).numel()
        parts = [self._range(name, kind, part, 0, size).view(first.shape) for part in range(first.parts)]
        return parts[0] if first.dim is None else torch.cat(parts, first.dim)

    def fill(self, piece: Piece) -> None:
        """Copy into a piece's views what they had when it was written. Raises KeyError, ValueError as `whole`."""
        want, saved = piece.place, self.places[piece.place.name][0][1]
        for kind, view in piece.views.items() if self.updates is not None else [("weight", piece.views["weight"])]:
            if (saved.parts, saved.shape) == (want.parts, want.shape):
                found = self._range(want.name, kind, want.part, want.start, want.count)
            else:
                whole = self.whole(want.name, kind)
                part = whole if want.dim is None else whole.chunk(want.parts, want.dim)[want.part]
                if tuple(part.shape) != want.shape:
                    raise ValueError(f"{want.name} is {tuple(part.shape)} there, {want.shape} here")
                found = part.flatten()[want.start : want.start + want.count]
            view.copy_(found)

    def _range(self, name: str, kind: str, part: int, start: int, count: int) -> Tensor:
        """Elements [start, start + count) of a part, flat, from the pieces that overlap them."""
        out, filled = torch.empty(count), 0
        for number, p in self.places[name]:
            first, last = max(start, p.start), min(start + count, p.start + p.count)
            if p.part == part and first < last:
                key = name if self.updates is None else f"{kind}/{name}"
                out[first - start : last - start] = (
                    self.files[number].get_tensor(key).flatten()[first - p.start : last - p.start]
                )
                filled += last - first
        if filled != count:
            raise ValueError(f"{name} has {filled} of {count} elements")
        return out
