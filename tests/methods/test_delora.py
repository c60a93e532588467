"""What only DeLoRA promises: a bounded update whose size is lambda's alone, whatever the lengths of A's rows and B's columns."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.delora import DeLoRADelta
from tests.methods.small import layer, randomise


def delora(model: nn.Module, seed: int = 1, **options: float) -> DeLoRADelta:
    (delta,) = graft.attach(model, "delora", **{"rank": 2, **options}).deltas.values()
    assert isinstance(delta, DeLoRADelta)
    randomise(delta, seed)
    return delta


def definition(A: Tensor, B: Tensor, strength: Tensor, W: Tensor) -> Tensor:
    """The sum over r terms, each a unit column times a unit row, over columns of W's own lengths."""
    total = torch.zeros_like(W)
    for a, b in zip(A, B.T, strict=True):
        total = total + torch.outer(b / b.square().sum().sqrt(), a / a.square().sum().sqrt())
    return strength / len(A) * total * W.square().sum(0).sqrt()


def difference(delta: DeLoRADelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), strength=st.floats(0.1, 20))
def test_the_update_is_the_definition_and_bounded(out: int, width: int, rank: int, strength: float) -> None:
    model = layer(out, width).double()
    delta = delora(model, rank=min(rank, out, width))
    with torch.no_grad():
        delta.strength.fill_(strength)
    W = model[0].weight.detach()
    update = difference(delta)
    torch.testing.assert_close(update, definition(delta.A, delta.B, delta.strength, W).detach())
    longest = W.norm(dim=0).max()
    assert update.norm() <= strength * longest * (1 + 1e-9)
    B, A = delta.product()
    for k in range(len(A)):
        assert torch.outer(B[:, k], A[k]).norm() <= strength / len(A) * longest * (1 + 1e-9)


def test_gradients_equal_autograd_through_the_definition_and_leave_lengths_alone() -> None:
    model = layer().double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = delora(model)
    x = torch.randn(5, 9, dtype=torch.float64)
    leaves = [p.detach().clone().requires_grad_(True) for p in (delta.A, delta.B, delta.strength)]
    wanted = torch.autograd.grad(F.linear(x, W + definition(*leaves, W), b).square().sum(), leaves)
    model(x).square().sum().backward()
    for p, gradient in zip((delta.A, delta.B, delta.strength), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert (delta.A.grad * delta.A).sum(1).abs().max() < 1e-9 * delta.A.grad.norm()
    assert (delta.B.grad * delta.B).sum(0).abs().max() < 1e-9 * delta.B.grad.norm()


def test_lengths_mean_nothing_and_lambda_is_the_size() -> None:
    delta = delora(layer().double())
    before = difference(delta)
    with torch.no_grad():
        delta.A.mul_(torch.tensor([[0.01], [300.0]]))
        delta.B.mul_(torch.tensor([7.0, 0.2]))
    torch.testing.assert_close(difference(delta), before)
    with torch.no_grad():
        delta.strength.mul_(-3)
    torch.testing.assert_close(difference(delta), -3 * before)


def test_short_vectors_count_as_peft_counts_them() -> None:
    from peft.tuners.delora.layer import DeloraLayer

    model = layer().double()
    delta = delora(model, rank=3)
    with torch.no_grad():
        delta.A[0] *= 1e-6
        delta.B[:, 1] *= 1e-6
        delta.B[:, 2] = 0
    expected = DeloraLayer._compute_delta(delta.A, delta.B, delta.strength, 3, model[0].weight.norm(dim=0))
    torch.testing.assert_close(difference(delta), expected.detach(), rtol=1e-9, atol=1e-15)
    assert difference(delta).norm() > 0


def test_the_first_backward_moves_b_only() -> None:
    model = layer()
    expected = model(x := torch.randn(4, 9))
    (delta,) = graft.attach(model, "delora", rank=2, strength=3.0).deltas.values()
    assert torch.equal(model(x), expected)
    assert delta.strength.item() == 3.0
    model(x).square().sum().backward()
    assert torch.isfinite(delta.B.grad).all()
    assert delta.B.grad.any()
    assert not delta.A.grad.any()
    assert not delta.strength.grad.any()


def test_one_step_reaches_full_strength_at_any_learning_rate() -> None:
    """What the docstring warns of: B's columns are longer than the least norm after one step, and from there on length is no size."""
    sizes = []
    for lr in (1e-3, 1e-1):
        model = layer()
        adapter = graft.attach(model, "delora", rank=1, strength=3.0)
        (delta,) = adapter.deltas.values()
        optimizer = adapter.optimizer(lr=lr, total_steps=10)
        torch.manual_seed(1)
        model(torch.randn(4, 9)).square().sum().backward()
        optimizer.step()
        sizes.append(float(difference(delta).norm()))
    assert 0.95 < sizes[0] / sizes[1] < 1.05


def test_lambda_gets_no_weight_decay() -> None:
    adapter = graft.attach(layer(), "delora", rank=2)
    (delta,) = adapter.deltas.values()
    optimizer = adapter.optimizer(lr=0.1, weight_decay=0.5, total_steps=3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {id(delta.A): 0.5, id(delta.B): 0.5, id(delta.strength): 0.0}


def test_the_lengths_of_the_columns_come_from_the_file(tmp_path: Path) -> None:
    model, other = layer(seed=0), layer(seed=5)
    delta = delora(model)
    graft.adapters_of(model)["default"].save(tmp_path)
    (loaded,) = graft.load_adapter(other, tmp_path, check_base=False).deltas.values()
    torch.testing.assert_close(difference(loaded), difference(delta))


def test_it_is_a_lora_of_its_rank() -> None:
    delta = delora(layer(20, 30).double(), rank=3)
    B, A, error = graft.lora_factors(delta)
    assert (error, len(A)) == (0, 3)
    torch.testing.assert_close(B @ A, difference(delta))
