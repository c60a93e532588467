"""What only SVFit promises: it moves singular values and nothing else."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graft
from tests.methods.small import layer, randomise


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9))
def test_singular_values_move_and_vectors_stay(out: int, width: int) -> None:
    model = layer(out, width).double()
    (delta,) = graft.attach(model, "svfit").deltas.values()
    randomise(delta)
    U, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    assert len(delta.d) == len(S)
    moved = delta.weight()[0].detach()
    torch.testing.assert_close(moved, (U * (S + delta.d)) @ Vh)
    torch.testing.assert_close(torch.linalg.svdvals(moved), (S + delta.d).detach().abs().sort(descending=True).values)


def test_gradient_by_its_formula() -> None:
    model = layer().double()
    (delta,) = graft.attach(model, "svfit", rank=4).deltas.values()
    randomise(delta)
    x = torch.randn(5, 9, dtype=torch.float64)
    W = delta.weight()[0].detach().requires_grad_(True)
    (x @ W.T + model[0].bias).square().sum().backward()
    model(x).square().sum().backward()
    for i in range(4):
        torch.testing.assert_close(delta.d.grad[i], delta.U[:, i] @ W.grad @ delta.V[i])


def test_the_leading_ones_train() -> None:
    model = layer().double()
    (delta,) = graft.attach(model, "svfit", rank=2).deltas.values()
    U, S, Vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    with torch.no_grad():
        delta.d.copy_(-S[:2])
    torch.testing.assert_close(delta.weight()[0].detach(), (U[:, 2:] * S[2:]) @ Vh[2:])
