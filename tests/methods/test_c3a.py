"""What only C3A promises: circulant blocks as PEFT means them, by transforms or as a matrix, and block sizes that fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.c3a import C3A, C3ADelta
from tests.methods.small import layer, randomise


def c3a(model: nn.Module, seed: int = 1, **options: int) -> C3ADelta:
    (delta,) = graft.attach(model, "c3a", **options).deltas.values()
    assert isinstance(delta, C3ADelta)
    randomise(delta, seed)
    return delta


def definition(w: Tensor) -> Tensor:
    """Row p of a block is its vector, turned to the right by p."""
    rows = [torch.cat([torch.stack([kernel.roll(p) for p in range(w.shape[2])]) for kernel in row], 1) for row in w]
    return torch.cat(rows) / (w.shape[1] * w.shape[2])


def difference(delta: C3ADelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 4), n=st.integers(1, 4), block=st.integers(1, 9))
def test_the_update_is_the_definition_and_peft_s(m: int, n: int, block: int) -> None:
    from peft.tuners.c3a.utils import get_circulant_fast

    delta = c3a(layer(m * block, n * block).double(), block=block)
    assert delta.w.shape == (m, n, block)
    torch.testing.assert_close(difference(delta), definition(delta.w.detach()))
    torch.testing.assert_close(difference(delta), get_circulant_fast(delta.w.detach()) / (n * block))


@pytest.mark.parametrize("rows", [1, 3, 200])  # few inputs by transforms, many by the matrix
@pytest.mark.parametrize("block", [17, 32, 8])
def test_outputs_and_gradients_equal_autograd_through_the_definition(rows: int, block: int) -> None:
    model = layer(2 * block, 3 * block).double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = c3a(model, block=block)
    x = torch.randn(rows, 3 * block, dtype=torch.float64)
    w = delta.w.detach().clone().requires_grad_(True)
    expected = F.linear(x, W + definition(w), b)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    torch.testing.assert_close(delta.w.grad, torch.autograd.grad(expected.square().sum(), w)[0])


def test_few_inputs_never_form_a_matrix() -> None:
    """One input keeps nothing of the size of W for the backward pass."""
    model = layer(64, 96)
    c3a(model, block=32)
    kept: list[int] = []
    own = model[0].weight.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(0 if t.data_ptr() == own else t.numel()), t)[1], lambda t: t):
        model(torch.randn(1, 96, requires_grad=True)).sum().backward()
    assert 0 < max(kept) < 64 * 96 / 4


@example(out=12, width=18, block=5)
@given(out=st.integers(1, 300), width=st.integers(1, 300), block=st.integers(1, 300))
def test_the_block_is_the_largest_common_divisor_within_the_option(out: int, width: int, block: int) -> None:
    fitting = C3A(block=block).fitting(out, width)
    assert fitting == [size for size in range(1, block + 1) if out % size == width % size == 0][-1]
    assert C3A(block=block).parameters(out, width) == (out // fitting) * (width // fitting) * fitting


def test_a_block_of_one_is_any_matrix() -> None:
    delta = c3a(layer(5, 7).double())
    torch.testing.assert_close(difference(delta), delta.w.detach()[:, :, 0] / 7)


def test_the_rank_can_be_full_with_few_numbers() -> None:
    delta = c3a(layer(32, 32).double(), block=32)
    assert delta.w.numel() == 32
    assert torch.linalg.matrix_rank(difference(delta)) == 32


def test_the_first_update_moves_it_from_zero() -> None:
    model = layer(12, 18)
    (delta,) = graft.attach(model, "c3a", block=6).deltas.values()
    assert not delta.w.any()
    model(torch.randn(4, 18)).square().sum().backward()
    assert (delta.w.grad != 0).all()
