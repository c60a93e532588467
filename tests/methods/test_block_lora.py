"""What only Block-LoRA promises: which LoRA each of its two readings is."""

from __future__ import annotations

import pytest
import torch

import graft
from tests.methods.small import layer, randomise


@pytest.mark.parametrize("along", ["rank", "input"])
def test_one_block_is_lora(along: str) -> None:
    model, twin = layer(), layer()
    runs = [graft.attach(model, "block-lora", rank=3, blocks=1, along=along), graft.attach(twin, "lora", rank=3)]
    for adapter, net in zip(runs, (model, twin), strict=True):
        optimizer = adapter.optimizer(lr=0.1, total_steps=4)
        for step in range(4):
            optimizer.zero_grad()
            net(torch.randn(5, 9, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model[0].graft.deltas["default"].weight()[0], twin[0].graft.deltas["default"].weight()[0])


def test_along_the_rank_the_arms_add_up() -> None:
    model = layer().double()
    (delta,) = graft.attach(model, "block-lora", rank=6, blocks=3, alpha=3.0).deltas.values()
    randomise(delta)
    assert delta.A.shape == (2, 9)
    assert delta.B.shape == (3, 6, 2)
    wanted = 0.5 * sum(B @ delta.A for B in delta.B)
    torch.testing.assert_close(delta.weight()[0] - model[0].weight, wanted)
    model(torch.randn(5, 9, dtype=torch.float64)).square().sum().backward()
    assert all(torch.equal(gradient, delta.B.grad[0]) for gradient in delta.B.grad)


def test_along_the_input_the_pieces_share_a_projection() -> None:
    model = layer().double()
    (delta,) = graft.attach(model, "block-lora", rank=4, blocks=3, along="input").deltas.values()
    randomise(delta)
    assert delta.A.shape == (4, 3)
    x = torch.randn(5, 9, dtype=torch.float64)
    pieces = x[:, :3] + x[:, 3:6] + x[:, 6:]
    torch.testing.assert_close(model(x), torch.nn.functional.linear(x, model[0].weight, model[0].bias) + 2 * pieces @ delta.A.T @ delta.B[0].T)


def test_along_the_input_pieces_are_equal() -> None:
    (delta,) = graft.attach(layer(6, 10), "block-lora", rank=4, blocks=4, along="input").deltas.values()
    assert delta.copies == 2  # neither 4 nor 3 divides 10


def test_a_rank_that_blocks_do_not_divide() -> None:
    with pytest.raises(graft.GraftError, match="rank is 5, which 2 blocks do not divide"):
        graft.attach(layer(), "block-lora", rank=5)
