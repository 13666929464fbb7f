"""Runs Gluon kernels of one GPU generation (sm_90) in Python, as Triton's interpreter does not.

A kernel's own source runs, its names bound to stand-ins: tensors are torch's, each group of warps is a thread, and
barriers count arrivals and bytes as the GPU's do. What the copy engine was asked for happens as late as it may: what it
loads is NaN until somebody has waited for its barrier, and what it stores is read when stores are waited for. So a wait
that is missing, or for the wrong phase, shows by NaN or by never ending. Where groups of warps are uneven, each is slow
at times, and a barrier that one of them can miss a phase of shows too. Products are of the operands' own precision,
their sums in fp32, done at once: a wait for them that is missing does not show, nor do warps that fall apart.
"""

import builtins
import itertools
import random
import threading
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Optional

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PATIENCE = 60.0  # seconds until a wait is one for ever
PAUSES = (0.0, 0.0, 0.0, 0.001, 0.03)  # seconds at most, before a group of warps meets others


class Values(Tensor):
    """A tensor of a kernel: it has a layout, and operators never change it in place."""

    type = SimpleNamespace(layout=None)
    __iadd__, __imul__ = Tensor.__add__, Tensor.__mul__


def values(x: Tensor) -> Values:
    return x.as_subclass(Values)


@dataclass(frozen=True)
class Pointer:
    """Some of a tensor's elements, by their places in memory."""

    memory: Tensor
    at: Any = 0

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.at + more)


def load(p: Pointer, mask: Any = True, other: float = 0) -> Any:
    flat = p.memory.reshape(-1)
    if not isinstance(p.at, Tensor):
        return flat[p.at].item() if mask else other
    there = torch.as_tensor(mask).expand(p.at.shape)
    return values(torch.where(there, flat[torch.where(there, p.at, 0)], torch.tensor(other, dtype=flat.dtype)))


def store(p: Pointer, value: Any, mask: Any = True) -> None:
    at = torch.as_tensor(p.at)
    there = torch.as_tensor(mask).expand(at.shape)
    flat = p.memory.view(-1)
    flat[at[there]] = torch.as_tensor(value).expand(at.shape)[there].to(flat.dtype)


def add(p: Pointer, value: int) -> int:
    """Of whole numbers; programs run one after the other, and no more than one warp of each adds."""
    flat = p.memory.view(-1)
    before = flat[p.at].item()
    flat[p.at] += value
    return before


@dataclass
class Shared:
    """A piece of shared memory."""

    memory: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.memory.dtype

    def index(self, i: int) -> "Shared":
        return Shared(self.memory[i])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.memory.permute(order))

    def load(self, layout: Any) -> Values:
        return values(self.memory.clone())

    def store(self, value: Tensor) -> None:
        self.memory.copy_(value)


@dataclass
class Barrier:
    """Counts arrivals, and bytes on their way; the next phase begins when all of them came."""

    count: int = 0
    arrived: int = 0
    expected: int = 0  # bytes
    phase: int = 0
    copies: list[tuple[int, Callable[[], None]]] = field(default_factory=list)

    def arrive(self, count: int) -> None:
        self.arrived += count
        assert self.arrived <= self.count, "more arrivals at a barrier than it counts"
        if not self.expected:
            self.turn()

    def over(self, parity: int) -> bool:
        """Whether a phase of this parity is over; what was only waiting to be copied is copied then."""
        if self.phase == parity:
            self.turn()
        return self.phase != parity

    def turn(self) -> None:
        """To the next phase, if all is there."""
        if self.arrived == self.count and sum(size for size, _ in self.copies) == self.expected:
            for _, copy in self.copies:
                copy()
            self.arrived, self.expected, self.copies, self.phase = 0, 0, [], self.phase ^ 1


@dataclass(frozen=True)
class Boxes:
    """A tensor descriptor within a kernel."""

    tensor: TensorDescriptor

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.base.dtype

    def box(self, corner: list[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of a box that lies in the tensor, and where in the box it lies."""
        t = self.tensor
        whole = torch.as_strided(t.base, t.shape, t.strides, t.base.storage_offset())
        ends = [min(c + b, s) for c, b, s in zip(corner, t.block_shape, t.shape)]
        inside = tuple(slice(c, max(c, e)) for c, e in zip(corner, ends))
        return whole[inside], tuple(slice(0, i.stop - i.start) for i in inside)


class Program:
    """One program of a grid: its barriers, what its copy engine still has to store, and the stand-ins for modules."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], uneven: bool = False):
        self.place, self.grid, self.uneven = place, grid, uneven
        self.changed = threading.Condition()
        self.barriers: dict[int, Barrier] = {}
        self.stores = threading.local()
        self.pauses = threading.local()

    def barrier(self, at: Shared) -> Barrier:
        return self.barriers.setdefault(at.memory.data_ptr(), Barrier())

    def init(self, at: Shared, count: int) -> None:
        self.barrier(at).count = count

    def pause(self) -> None:
        if self.uneven:
            longest = vars(self.pauses).setdefault("longest", random.choice(PAUSES))
            if random.random() < 1 / 30:
                self.pauses.longest = random.choice(PAUSES)
            time.sleep(longest * random.random())

    def expect(self, at: Shared, size: int) -> None:
        with self.changed:
            self.barrier(at).expected += size
        self.arrive(at)

    def arrive(self, at: Shared, count: int = 1) -> None:
        self.pause()
        with self.changed:
            self.barrier(at).arrive(count)
            self.changed.notify_all()

    def wait(self, at: Shared, parity: int) -> None:
        self.pause()
        with self.changed:
            if not self.changed.wait_for(lambda: self.barrier(at).over(parity), PATIENCE):
                raise AssertionError("a wait that does not end")
            self.changed.notify_all()

    def fetch(self, boxes: Boxes, corner: list[int], at: Shared, to: Shared) -> None:
        found, where = boxes.box(corner)
        assert list(to.memory.shape) == boxes.tensor.block_shape

        def copy() -> None:
            to.memory.zero_()
            to.memory[where] = found

        with self.changed:
            to.memory.fill_(float("nan"))
            self.barrier(at).copies.append((to.memory.numel() * to.memory.element_size(), copy))
            self.changed.notify_all()

    def send(self, boxes: Boxes, corner: list[int], of: Shared) -> None:
        into, where = boxes.box(corner)
        vars(self.stores).setdefault("waiting", []).append(lambda: into.copy_(of.memory[where]))

    def sent(self, pending: int = 0) -> None:
        waiting = vars(self.stores).setdefault("waiting", [])
        while len(waiting) > pending:
            waiting.pop(0)()

    def done(self) -> None:
        """At the end of a group of warps."""
        assert not vars(self.stores).get("waiting"), "stores that nobody waited for"

    def specialize(self, work: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        assert len(work) == len(warps) + 1 == len(registers) + 1
        failed: list[BaseException] = []

        def run(body: Callable, args: tuple) -> None:
            try:
                body(*args)
                self.done()
            except BaseException as e:
                failed.append(e)

        threads = [threading.Thread(target=run, args=each, daemon=True) for each in work]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if failed:
            raise failed[0]

    def names(self) -> dict[str, Any]:
        """What stands for the modules and functions that kernels import, by their names there."""
        language = SimpleNamespace(
            program_id=lambda axis: self.place[axis], num_programs=lambda axis: self.grid[axis],
            warp_specialize=self.specialize, allocate_shared_memory=_allocate, load=load, store=store,
            arange=lambda a, b, layout=None: _arange(a, b), atomic_add=add, num_warps=lambda: 4,
            full=lambda shape, value, dtype, layout=None: values(torch.full(shape, value, dtype=dtype)),
            zeros=lambda shape, dtype, layout=None: values(torch.zeros(shape, dtype=dtype)),
            convert_layout=lambda x, layout: x, expand_dims=lambda x, axis: x.unsqueeze(axis), static_range=range,
            where=_where, maximum=_either(max, torch.maximum), minimum=_either(min, torch.minimum),
            max=lambda x, axis: values(x.amax(axis)), sum=lambda x, axis: values(x.sum(axis)),
            exp2=torch.exp2, log2=torch.log2, float32=torch.float32, int32=torch.int32, int64=torch.int64,
            constexpr=lambda x: x, debug_barrier=lambda: None, **dict.fromkeys(LAYOUTS, lambda *_, **__: None),
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            init=self.init, expect=self.expect, arrive=self.arrive, wait=self.wait, MBarrierLayout=lambda: None
        )
        tma = SimpleNamespace(
            async_copy_global_to_shared=self.fetch, async_copy_shared_to_global=self.send, store_wait=self.sent
        )
        return {
            "gl": language, "tl": language, "tma": tma, "mbarrier": mbarrier, "fence_async_shared": lambda: None,
            "warpgroup_mma": _multiply, "warpgroup_mma_wait": lambda _, found: found[0] if len(found) == 1 else found,
        }  # fmt: skip


LAYOUTS = (
    "BlockedLayout",
    "SwizzledSharedLayout",
    "SliceLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "DotOperandLayout",
)


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype))


def _arange(start: int, end: int) -> Values:
    return values(torch.arange(start, end, dtype=torch.int32))


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not any(isinstance(x, Tensor) for x in (condition, a, b)):
        return a if condition else b
    return values(torch.where(torch.as_tensor(condition), a, b))


def _either(scalars: Callable, tensors: Callable) -> Callable:
    def choose(a: Any, b: Any) -> Any:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return scalars(a, b)
        like = a if isinstance(a, Tensor) else b
        return values(tensors(*(torch.as_tensor(x, dtype=like.dtype) for x in (a, b))))

    return choose


def _multiply(a: Any, b: Shared, acc: Values, use_acc: bool = True, is_async: bool = False) -> Values:
    a = a.memory if isinstance(a, Shared) else a
    product = values(a.float() @ b.memory.float())
    return acc + product if use_acc else product


class Emulated:
    """Stands for a Gluon kernel: kernel[grid](...) runs its programs one after the other."""

    def __init__(self, kernel: Any, uneven: bool = False):
        self.kernel, self.uneven = kernel, uneven

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, num_warps=None, maxnreg=None, **kwargs: self.run(grid, args, kwargs)

    def run(self, grid: tuple[int, ...], args: tuple, kwargs: dict[str, Any]) -> None:
        for place in itertools.product(*map(range, grid)):
            program = Program(place, grid, self.uneven)
            bound = _bound(self.kernel.fn, program.names(), {})
            bound(*map(_given, args), **{name: _given(x) for name, x in kwargs.items()})
            program.done()


def _given(x: Any) -> Any:
    return Boxes(x) if isinstance(x, TensorDescriptor) else Pointer(x) if isinstance(x, Tensor) else x


def _bound(f: types.FunctionType, names: dict[str, Any], made: dict[Any, Any]) -> types.FunctionType:
    """The function with `names` for those of its module, and so for all functions that it calls."""
    if f not in made:
        space = {"__builtins__": builtins, "__name__": f.__name__}
        made[f] = types.FunctionType(f.__code__, space, f.__name__, f.__defaults__)
        space |= {name: _within(x, names, made) for name, x in f.__globals__.items() if name in f.__code__.co_names}
        space |= names
    return made[f]


def _within(x: Any, names: dict[str, Any], made: dict[Any, Any]) -> Any:
    if isinstance(x, tl.constexpr):
        return x.value
    inner: Optional[types.FunctionType] = getattr(x, "fn", None)
    return _bound(inner, names, made) if inner is not None else x
