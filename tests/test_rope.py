"""RoPE: lengths stay, and products of turned vectors depend on distance only."""

import torch

from parallel.rope import Rope, _turn

ROPE = Rope(8, 1000, 10000.0, torch.device("cpu"))


def test_position_zero_is_identity_and_lengths_stay():
    x = torch.randn(5, 2, 8)
    assert torch.equal(ROPE(x, torch.zeros(5, dtype=torch.long)), x)
    turned = ROPE(x, torch.tensor([0, 1, 500, 998, 999]))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_products_depend_on_distance_only():
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    at = lambda x, p: ROPE(x, torch.tensor([p]))  # noqa: E731
    near, far = (at(q, 7) * at(k, 3)).sum(), (at(q, 907) * at(k, 903)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
    assert not torch.isclose(near, (at(q, 8) * at(k, 3)).sum(), rtol=1e-3)


def test_angles_are_those_of_the_paper():
    x = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0]).view(1, 1, 8)  # first of the fastest pair: frequency 1
    y = ROPE(x, torch.tensor([3])).flatten()
    torch.testing.assert_close(
        y[[0, 4]],
        torch.tensor([3.0]).cos().item() * x.new_tensor([1, 0])
        + torch.tensor([3.0]).sin().item() * x.new_tensor([0, 1]),
    )


def test_bf16_stays_bf16_but_positions_keep_their_precision():
    x = torch.randn(1, 1, 8)
    exact = ROPE(x.bfloat16().float(), torch.tensor([901]))
    assert ROPE(x.bfloat16(), torch.tensor([901])).dtype is torch.bfloat16
    torch.testing.assert_close(ROPE(x.bfloat16(), torch.tensor([901])).float(), exact, rtol=1e-2, atol=1e-2)


def test_the_gradient_is_turned_back():
    x, positions = torch.randn(5, 2, 8, requires_grad=True), torch.tensor([0, 1, 500, 998, 999])
    dy = torch.randn(5, 2, 8)
    (ours,) = torch.autograd.grad(ROPE(x, positions), x, dy)
    (expected,) = torch.autograd.grad(_turn(x, ROPE.cos, ROPE.sin, positions), x, dy)
    torch.testing.assert_close(ours, expected)
