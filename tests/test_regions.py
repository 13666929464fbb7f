"""What goes on while a tensor-parallel collective is under way, seen in a profile of an MLP: it fails here where a
collective is waited for before the products behind which it hides."""

import pytest
import torch
from torch.profiler import profile, record_function

from parallel import comm
from parallel.mlp import MLP
from tests import ranks
from tests.test_tensor import MODEL, filled, inputs, part, tensor_parallel

MARKS = {"start": "(", "wait": ")", "aten::mm": ".", "aten::addmm_": "."}


class Marked:
    """A collective under way whose wait is seen in a profile."""

    def __init__(self, work: torch.distributed.Work):
        self.work = work

    def wait(self) -> None:
        with record_function("wait"):
            self.work.wait()


def marked(collective):
    """The same, with its start, and later its wait, in the profile."""

    def start(*args, **kwargs):
        with record_function("start"):
            return Marked(collective(*args, **kwargs))

    return start


def order(seen: profile) -> str:
    """Starts, waits and products of a profile in order of time, as MARKS; without products of no rows."""
    events = sorted((e for e in seen.events() if e.name in MARKS), key=lambda e: e.time_range.start)
    return "".join(MARKS[e.name] for e in events if not (e.name.startswith("aten") and 0 in e.input_shapes[0]))


def orders(sequence: bool, compiled: bool) -> tuple[str, str]:
    """Of forward and of backward."""
    tp = tensor_parallel(sequence)
    mlp = filled(MLP(MODEL, tp), tp)
    run = torch.compile(mlp, dynamic=False) if compiled else mlp
    x = part(inputs(), tp).clone().requires_grad_()
    run(x).sum().backward()  # compiles
    comm._gather, comm._scatter = marked(comm._gather), marked(comm._scatter)
    torch.distributed.all_reduce = marked(torch.distributed.all_reduce)
    with profile(record_shapes=True) as forward:
        y = run(x).sum()
    with profile(record_shapes=True) as backward:
        y.backward()
    return order(forward), order(backward)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sequence", [False, True])
def test_products_are_computed_while_collectives_are_under_way(sequence, compiled):
    gather = "(..).." if sequence else ".."  # gate and up of own tokens, of the others
    leave = "..(..())" if sequence else ".(.())"  # down of the first tokens, of the rest, for each rank its own
    back = "(.).." if sequence else ".."  # down: dx of own tokens, of the others, dW
    enter = "..(..)"  # dx of gate and up, both dW
    expected = gather + leave, back + enter
    assert ranks.run(2, orders, sequence, compiled) == [expected, expected]
