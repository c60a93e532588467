"""What only HRA promises: a product of reflections, pairs that cancel, an update of rank r, the penalty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.hra import HRADelta
from tests import tiny
from tests.methods.small import as_peft, layer, randomise


def hra(model: nn.Module, **options: Any) -> HRADelta:
    (delta,) = graft.attach(model, "hra", **options).deltas.values()
    assert isinstance(delta, HRADelta)
    return delta


def reflections(u: Tensor) -> Tensor:
    """H_1 ... H_r, one after the other."""
    R = torch.eye(len(u), dtype=u.dtype)
    for column in u.T:
        R = R @ (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(column, column) / column.square().sum())
    return R


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 7), width=st.integers(2, 9), pairs=st.integers(1, 4))
def test_one_reflection_after_the_other(out: int, width: int, pairs: int) -> None:
    """Values and gradients; W' W'^T = W W^T; the update has the factors of a LoRA of rank r."""
    rank = 2 * min(pairs, width // 2)
    model = layer(out, width).double()
    delta = hra(model, rank=rank)
    randomise(delta)
    W, u = model[0].weight.detach(), delta.u.detach().clone().requires_grad_(True)
    x, direction = torch.randn(4, width, dtype=torch.float64), torch.randn(4, out, dtype=torch.float64)
    wanted = x @ (W @ reflections(u)).T + model[0].bias
    torch.testing.assert_close(model(x), wanted)
    model(x).backward(direction)
    torch.testing.assert_close(delta.u.grad, torch.autograd.grad(wanted, u, direction)[0])
    adapted, (B, A) = delta.weight()[0], delta.factors()
    torch.testing.assert_close(adapted @ adapted.T, W @ W.T)
    assert A.shape == (rank, width)
    torch.testing.assert_close(B @ A, adapted - W)


def test_pairs_begin_equal_and_learn_at_once() -> None:
    model = layer(30, 40)
    delta = hra(model, rank=6)
    assert torch.equal(delta.u[:, ::2], delta.u[:, 1::2])
    assert 0.95 / 3**0.5 < delta.u.abs().max() <= 1 / 3**0.5
    torch.testing.assert_close(delta.weight()[0], model[0].weight.detach(), rtol=0, atol=1e-6)
    model(torch.randn(5, 40)).square().sum().backward()
    assert delta.u.grad.abs().sum(0).min() > 1e-3


def test_lengths_do_not_matter() -> None:
    model = layer().double()
    delta = hra(model, rank=4)
    randomise(delta)
    before = delta.weight()[0].detach()
    with torch.no_grad():
        delta.u.mul_(torch.tensor([3.0, 0.1, -2.0, 7.0]))
    torch.testing.assert_close(delta.weight()[0], before)


def test_the_penalty_adds_its_gradient_to_the_loss() -> None:
    """lambda |I - U^T U|_F^2 over both targets; on SGD with learning rate 1 and no loss, the step is minus its gradient."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 6)).double()
    adapter = graft.attach(model, "hra", targets="all", rank=4, orthogonality=0.3)
    for delta in adapter.deltas.values():
        randomise(delta)
    before = [delta.u.detach().clone().requires_grad_(True) for delta in adapter.deltas.values()]
    penalty = sum(0.3 * sum((float(i == j) - u[:, i] @ u[:, j] / (u[:, i].norm() * u[:, j].norm())) ** 2 for i in range(4) for j in range(4))
                  for u in before)  # fmt: skip
    gradients = torch.autograd.grad(penalty, before)
    adapter.bind(torch.optim.SGD(adapter.parameters(), lr=1.0), total_steps=1).step()
    for delta, old, gradient in zip(adapter.deltas.values(), before, gradients, strict=True):
        torch.testing.assert_close(delta.u, old - gradient)
    assert not graft.attach(layer(), "hra", rank=4).callbacks


def test_odd_ranks_and_gram_schmidt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match=r"rank is 3.*even"):
        graft.attach(layer(), "hra", rank=3)
    with pytest.raises(graft.GraftError, match="at most 9"):
        graft.attach(layer(60, 9), "hra", rank=10)
    graft.attach(tiny.llama(), "hra", rank=4).save(tmp_path)
    as_peft(tmp_path, apply_GS=True)
    with pytest.raises(graft.GraftError, match="apply_GS = True, and Graft has False only"):
        graft.load_adapter(tiny.llama(), tmp_path)
