"""The compression MLP by kernels against its definition, by Triton's interpreter."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import library
from torch.utils.checkpoint import checkpoint

from nsa import Documents, NSACore, core, reference
from nsa.compress import _compress, block_linear, compress
from nsa.memory import UNITS
from tests import kernels
from tests.kernels import CPU, SIZES, interpreted


def check_block_linear(device: str, dtype: torch.dtype, heads: int, width: int, hidden: int, l: int, d: int) -> None:
    """Against windows that are copied, in fp64; `filled` memory, so that all of a gradient has to be written."""
    generator = torch.Generator().manual_seed(0)
    documents = Documents.of(torch.tensor([0, 3 * l + 1, 3 * l + 3, 9 * l]), device)
    blocks = documents.blocks(l, d)
    x, w = (torch.randn(s, generator=generator).to(device, dtype) for s in ((9 * l, heads, width), (hidden, l * width)))
    dy = torch.randn(len(blocks.first), heads, hidden, generator=generator).to(device, dtype)

    def plain(x, w):
        windows = x[blocks.first[:, None] + torch.arange(l, device=device)]  # [m, l, h, e]
        return windows.transpose(1, 2).flatten(2) @ w.T

    def ours(x, w):
        return block_linear(x, w, blocks.first, *blocks.starts, l, d)

    def run(f, dtype):
        values = [t.to(dtype).requires_grad_() for t in (x, w)]
        y = f(*values)
        return [y, *torch.autograd.grad(y, values, dy.to(dtype))]

    with kernels.filled():
        got = run(ours, dtype)
    for name, *three in zip(("y", "x", "w"), got, run(plain, dtype), run(plain, torch.float64)):
        assert kernels.differs(name, *three, dy.double()) is None
    assert all(torch.equal(a, b) for a, b in zip(got, run(ours, dtype)))


@interpreted
@pytest.mark.parametrize(("heads", "hidden", "l", "d"), [(3, 5, 8, 4), (1, 8, 4, 4)])
def test_the_first_layer_of_compression(heads, hidden, l, d):
    check_block_linear("cpu", torch.float32, heads, 8, hidden, l, d)


class Compressed:
    """Keys and values as a run has them, among others or not in rows, and weights for their compression."""

    names = ("k", "v", *(f"{leaf} of {x}" for x in "kv" for leaf in ("pe", "w1", "b1", "w2", "b2")))

    def __init__(self, device, dtype, heads, widths, hidden, l, d, cu_seqlens=None):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        def phi(e: int, hidden: int) -> list[torch.Tensor]:
            layers = draw(hidden, l * e, scale=(l * e) ** -0.5), draw(e, hidden, scale=hidden**-0.5)
            return [draw(l, e), layers[0], draw(hidden), layers[1], draw(e)]

        self.l, self.d, n = l, d, 9 * l
        self.blocks = Documents.of(torch.tensor(cu_seqlens or [0, 3 * l + 1, 3 * l + 3, n]), device).blocks(l, d)
        k, v = draw(n, heads, 2, widths[0])[:, :, 1], draw(n, widths[1], heads).transpose(1, 2)
        self.x = [k, v, *phi(widths[0], hidden[0]), *phi(widths[1], hidden[1])]
        self.dy = [draw(len(self.blocks.first), heads, e) for e in widths]

    def ours(self, k, v, *phis):
        blocks = self.blocks
        return compress(k, v, phis[:5], phis[5:], blocks.first, *blocks.starts, self.l, self.d)

    def plain(self, k, v, *phis):
        pairs = (k, phis[:5]), (v, phis[5:])
        return tuple(reference.compress_mlp(x, self.blocks.first, *phi) for x, phi in pairs)

    def run(self, f, dtype=None):
        """Both outputs, and all gradients."""
        values = [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.x]
        y = f(*values)
        return [*y, *torch.autograd.grad(y, values, [t.to(dtype or t.dtype) for t in self.dy])]


def check_compress(device: str, dtype: torch.dtype, *sizes) -> None:
    """Against the definition in fp64, and twice the same."""
    case = Compressed(device, dtype, *sizes)
    with kernels.filled():
        ours = case.run(case.ours)
    wanted = zip(ours, case.run(case.plain), case.run(case.plain, torch.float64), strict=True)
    for name, three in zip(("k_cmp", "v_cmp", *case.names), wanted, strict=True):
        assert kernels.differs(name, *three, case.dy["v" in name].double()) is None
    assert all(map(torch.equal, ours, case.run(case.ours)))


UNEVEN = (5, (12, 8), (5, 17), 8, 4)  # more rows than a tile has; the widths and hidden units of keys and of values


@interpreted
@pytest.mark.parametrize("sizes", [UNEVEN, (1, (8, 16), (16, 8), 4, 4)], ids=str)
def test_compression_of_keys_and_values_at_once(sizes):
    check_compress("cpu", torch.float32, *sizes)


@interpreted
def test_the_position_encoding_reaches_every_block():
    case = Compressed("cpu", torch.float32, *UNEVEN)
    for x in case.x[:2]:
        x.zero_()
    for y, exact in zip(case.ours(*case.x), case.plain(*(t.double() for t in case.x))):
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.equal(y, y[:1, :1].expand_as(y))
    case.x[2][-1, -1] += 1
    assert not torch.equal(case.ours(*case.x)[0], y)


@interpreted
def test_compression_of_documents_without_a_block():
    case = Compressed("cpu", torch.float32, *UNEVEN, [*range(0, 72, 7), 72, 72])
    with kernels.filled():
        k, v, *gradients = case.run(case.ours)
    assert (k.shape, v.shape) == ((0, 5, 12), (0, 5, 8))
    assert [g.shape for g in gradients] == [t.shape for t in case.x]
    assert not any(g.any() for g in gradients)


@interpreted
@pytest.mark.parametrize("wanted", [["k"], ["v", "w2 of v"], ["pe of k"], ["b1 of v", "b1 of k"]], ids=str)
def test_compression_sends_gradients_where_they_are_wanted(wanted):
    case = Compressed("cpu", torch.float32, 2, (8, 8), (5, 5), 4, 4)
    everything = dict(zip(case.names, case.run(case.ours)[2:]))
    values = {name: t.detach().requires_grad_(name in wanted) for name, t in zip(case.names, case.x)}
    gradients = torch.autograd.grad(case.ours(*values.values()), [values[name] for name in wanted], case.dy)
    assert all(torch.equal(g, everything[name]) for name, g in zip(wanted, gradients))


@interpreted
def test_keys_alone_may_send_a_gradient_back():
    case = Compressed("cpu", torch.float32, 2, (8, 8), (5, 5), 4, 4)
    values = [t.detach().requires_grad_() for t in case.x]
    found = torch.autograd.grad(case.ours(*values)[0], values, case.dy[0], allow_unused=True)
    ours = [name for name, g in zip(case.names, found) if g is not None]
    assert ours == [name for name in case.names if name[-1] == "k"]
    expected = dict(zip(case.names, case.run(case.ours)[2:]))
    assert all(g is None or torch.equal(g, expected[name]) for name, g in zip(case.names, found))


@interpreted
def test_compression_compiled_whole_and_computed_again_is_the_same():
    case = Compressed("cpu", torch.float32, 2, (8, 8), (5, 5), 4, 4)
    plain = case.run(case.ours)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for f in (compiled, *(partial(checkpoint, case.ours, use_reentrant=reentrant) for reentrant in (True, False))):
        values = [t.detach().requires_grad_() for t in case.x]
        y = f(*values)
        torch.autograd.backward(y, case.dy)
        assert all(map(torch.equal, (*y, *(t.grad for t in values)), plain))
    values = [t.detach().requires_grad_() for t in case.x]
    blocks = case.blocks
    library.opcheck(_compress, (*values[:2], values[2:7], values[7:], blocks.first, *blocks.starts, case.l, case.d))


@interpreted
@pytest.mark.parametrize(("units", "launches"), [(UNITS, 0), (UNITS + 1, 2)])
def test_too_many_hidden_units_take_a_kernel_for_keys_and_one_for_values(units, launches, monkeypatch):
    calls, works = [], core._block_linear
    monkeypatch.setattr(core, "_block_linear", lambda *args: calls.append(args) or works(*args))
    made = NSACore(replace(SIZES, phi_hidden=units), 8, 8)
    for i, p in enumerate(made.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    blocks, shared = Documents.of(torch.tensor([0, 20]), CPU).blocks(8, 4), []
    x = [torch.randn(20, 1, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    ours, plain = (made.compress(*x, blocks, lambda p: shared.append(p) or p, kernels) for kernels in (True, False))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert len(calls) == launches
    assert [id(p) for p in shared] == 2 * [id(p) for p in made.parameters()]
