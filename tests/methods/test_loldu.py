"""What only LoLDU promises: it moves the diagonal of the pivoted decomposition and nothing else."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graft
from tests.methods.small import layer, randomise


def decomposed(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """scipy's P L, D and U."""
    PL, DU = scipy.linalg.lu(W.numpy(), permute_l=True)
    D = DU.diagonal().copy()
    return torch.from_numpy(PL), torch.from_numpy(D), torch.from_numpy(DU / D[:, None])


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), scale=st.floats(0.1, 3))
def test_the_diagonal_moves(out: int, width: int, scale: float) -> None:
    model = layer(out, width).double()
    (delta,) = graft.attach(model, "loldu", scale=scale).deltas.values()
    randomise(delta)
    PL, D, U = decomposed(model[0].weight.detach())
    torch.testing.assert_close(delta.weight()[0].detach(), PL @ torch.diag(D + scale * delta.d.detach()) @ U)


@pytest.mark.parametrize("pick", ["first", "largest"])
def test_which_pivots_train(pick: str) -> None:
    model = layer(7, 7).double()
    (delta,) = graft.attach(model, "loldu", rank=3, pick=pick).deltas.values()
    randomise(delta)
    PL, D, U = decomposed(model[0].weight.detach())
    chosen = [0, 1, 2] if pick == "first" else sorted(range(7), key=lambda i: -abs(D[i]))[:3]
    wanted = sum(delta.d[j].detach() * torch.outer(PL[:, i], U[i]) for j, i in enumerate(chosen))
    torch.testing.assert_close(delta.weight()[0].detach() - model[0].weight.detach(), wanted)


def test_a_singular_weight_stays_finite() -> None:
    model = layer(8, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 3) @ torch.randn(3, 8))
    (delta,) = graft.attach(model, "loldu").deltas.values()
    randomise(delta)
    assert delta.weight()[0].isfinite().all()
    assert delta.U.abs().max() < 1e4
