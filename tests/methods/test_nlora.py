"""What only SLoRA, NyströmLoRA and IntTune promise: their closed forms and starts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.families.three_factor import ThreeFactor
from tests.methods.small import layer, randomise


def one(model: nn.Module, method: str, **options: object) -> ThreeFactor:
    (delta,) = graft.attach(model, method, **options).deltas.values()
    assert isinstance(delta, ThreeFactor)
    return delta


def learn(model: nn.Module, delta: ThreeFactor, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(list(delta.parameters()), lr=0.1)
    for step in range(steps):
        x = torch.randn(5, 9, generator=torch.Generator().manual_seed(step)).to(delta.N)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), alpha=st.floats(0.1, 5))
def test_slora_is_its_closed_form(out: int, width: int, rank: int, alpha: float) -> None:
    model, rank = layer(out, width).double(), min(rank, out, width)
    delta = one(model, "slora", rank=rank, alpha=alpha)
    randomise(delta)
    x = torch.randn(4, width, dtype=torch.float64)
    base = F.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), base + alpha / rank * x @ delta.A.T @ delta.N.T @ delta.B.T)


def test_at_the_start_only_b_of_slora_has_a_gradient() -> None:
    model = layer()
    delta = one(model, "slora", rank=3)
    model(torch.randn(5, 9)).square().sum().backward()
    assert not delta.N.grad.any()
    assert not delta.A.grad.any()
    assert delta.B.grad.abs().sum() > 0


def test_slora_with_an_identity_between_is_lora() -> None:
    model, twin = layer(), layer()
    delta = one(model, "slora", rank=3, alpha=6.0)
    (lora,) = graft.attach(twin, "lora", rank=3, alpha=6.0).deltas.values()
    with torch.no_grad():
        delta.N.copy_(torch.eye(3))
        delta.A.copy_(lora.A)
        for B in (delta.B, lora.B):
            B.copy_(torch.randn(B.shape, generator=torch.Generator().manual_seed(2)))
    x = torch.randn(5, 9)
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("core", ["raw", "pinv"])
@pytest.mark.parametrize("method", ["nystrom-lora", "int-tune"])
def test_the_nystrom_start_is_blocks_of_w_and_is_taken_off(method: str, core: str) -> None:
    model = layer().double()
    W = model[0].weight.detach().clone()
    delta = one(model, method, rank=3, core=core, alpha=1.5)
    corner = W[:3, :3] if core == "raw" else torch.linalg.pinv(W[:3, :3])
    for value, wanted in ((delta.B, W[:, :3]), (delta.N, corner), (delta.A, W[:3])):
        torch.testing.assert_close(value.detach(), wanted)
    torch.testing.assert_close(delta.weight()[0], W, rtol=1e-12, atol=1e-12)
    learn(model, delta)
    wanted = W + 0.5 * (delta.B @ delta.N @ delta.A - W[:, :3] @ corner @ W[:3])
    torch.testing.assert_close(delta.weight()[0], wanted)
    assert (wanted - W).norm() > 1e-3


def test_the_inverted_core_gives_a_matrix_of_that_rank_back() -> None:
    model = layer().double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(6, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64))
    delta = one(model, "nystrom-lora", rank=3, core="pinv", cutoff=1e-9)
    torch.testing.assert_close(delta.B @ delta.N @ delta.A, model[0].weight)


def test_small_directions_of_the_corner_are_not_inverted() -> None:
    model = layer().double()
    with torch.no_grad():
        model[0].weight[:2, :2] = torch.tensor([[1.0, 0.0], [0.0, 1e-4]])
    delta = one(model, "nystrom-lora", rank=2, core="pinv")
    assert delta.N.abs().max() < 1.5


def test_int_tune_trains_the_core_alone() -> None:
    model = layer()
    adapter = graft.attach(model, "int-tune", rank=4)
    (delta,) = adapter.deltas.values()
    assert adapter.parameter_count == 16
    B, A = delta.B.clone(), delta.A.clone()
    optimizer = adapter.optimizer(lr=0.1, total_steps=3, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(5, 9)).square().sum().backward()
        optimizer.step()
    assert torch.equal(delta.B, B)
    assert torch.equal(delta.A, A)
    assert not torch.equal(delta.N, model[0].weight[:4, :4])


def grad_of(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def test_gradients_equal_autograd_through_the_definition() -> None:
    model = layer().double()
    delta = one(model, "nystrom-lora", rank=3)
    randomise(delta)
    W, x = model[0].weight.detach(), torch.randn(5, 9, dtype=torch.float64)
    B, N, A = (p.detach().clone().requires_grad_(True) for p in (delta.B, delta.N, delta.A))
    y = F.linear(x, W + B @ N @ A - W[:, :3] @ W[:3, :3] @ W[:3], model[0].bias)
    expected = grad_of(y.square().sum(), B, N, A)
    got = grad_of(model(x).square().sum(), delta.B, delta.N, delta.A)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
