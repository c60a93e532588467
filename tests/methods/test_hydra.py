"""What only Hydra promises: the closed form of its two heads, and in which space each of them lives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.hydra import HydraDelta
from tests import tiny
from tests.methods.small import Net, conv, layer, randomise


def hydra(model: nn.Module, seed: int = 1, **options: float) -> HydraDelta:
    (delta,) = graft.attach(model, "hydra", **{"rank": 2, "output_rank": 3, **options}).deltas.values()
    assert isinstance(delta, HydraDelta)
    randomise(delta, seed)
    return delta


def left(delta: HydraDelta) -> Tensor:
    """I + s_o D C: what multiplies W and b from the left."""
    return torch.eye(len(delta.D), dtype=delta.D.dtype) + delta.output_scale * delta.D.detach() @ delta.C.detach()


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 9),
    width=st.integers(1, 9),
    rank=st.integers(1, 9),
    output_rank=st.integers(1, 9),
    scale=st.floats(0.1, 3),
    output_scale=st.floats(0.1, 3),
    bias=st.booleans(),
)
def test_forward_and_weight_are_the_closed_form(
    out: int, width: int, rank: int, output_rank: int, scale: float, output_scale: float, bias: bool
) -> None:
    """y = h + s x A^T B^T + s_o h C^T D^T with h = x W^T + b, and W' = (I + s_o D C) W + s B A, b' = (I + s_o D C) b."""
    model = layer(out, width, bias).double()
    least = min(out, width)
    delta = hydra(model, rank=min(rank, least), output_rank=min(output_rank, least), scale=scale, output_scale=output_scale)
    x = torch.randn(5, width, dtype=torch.float64)
    h = F.linear(x, model[0].weight, model[0].bias)
    torch.testing.assert_close(model(x), h + scale * x @ delta.A.T @ delta.B.T + output_scale * h @ delta.C.T @ delta.D.T)
    W, b = delta.weight()
    torch.testing.assert_close(W, left(delta) @ model[0].weight + scale * delta.B @ delta.A)
    assert (b is None) == (not bias)
    if b is not None:
        torch.testing.assert_close(b, left(delta) @ model[0].bias)


def test_a_convolution_has_both_heads() -> None:
    model, x = conv(), torch.randn(2, 4, 5, 5)
    h = model(x)
    delta = hydra(model)
    parallel = F.conv2d(x, (delta.B @ delta.A).view(6, 4, 3, 3), padding=1)
    torch.testing.assert_close(model(x), h + parallel + torch.einsum("of,bfhw->bohw", delta.D @ delta.C, h), atol=1e-5, rtol=1e-5)


def test_gradients_equal_autograd_through_the_definition() -> None:
    model = layer().double()
    delta = hydra(model, scale=0.5, output_scale=2.0)
    x = torch.randn(5, 9, dtype=torch.float64)
    A, B, C, D = (p.detach().clone().requires_grad_(True) for p in (delta.A, delta.B, delta.C, delta.D))
    h = F.linear(x, model[0].weight, model[0].bias)
    wanted = torch.autograd.grad((h + 0.5 * x @ A.T @ B.T + 2.0 * h @ C.T @ D.T).square().sum(), (A, B, C, D))
    model(x).square().sum().backward()
    for p, gradient in zip((delta.A, delta.B, delta.C, delta.D), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_without_the_sequential_head_it_is_lora() -> None:
    model, twin = layer(), layer()
    delta = hydra(model, scale=2.0)
    (lora,) = graft.attach(twin, "lora", rank=2, alpha=4.0).deltas.values()
    with torch.no_grad():
        delta.D.zero_()
        lora.A.copy_(delta.A)
        lora.B.copy_(delta.B)
    x = torch.randn(4, 9)
    torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(delta.weight()[0], lora.weight()[0])


def test_without_the_parallel_head_it_is_an_adapter_on_the_output() -> None:
    model, twin = layer(), layer()
    delta = hydra(model)
    with torch.no_grad():
        delta.B.zero_()
    x = torch.randn(4, 9)
    torch.testing.assert_close(model(x), twin(x) @ left(delta).T)


def test_the_sequential_head_reads_the_bias() -> None:
    """Changing b by c changes y by (I + s_o D C) c."""
    model = layer()
    delta = hydra(model, output_scale=1.5)
    x, change = torch.randn(4, 9), torch.randn(6)
    before = model(x)
    with torch.no_grad():
        model[0].bias.add_(change)
    torch.testing.assert_close(model(x) - before, (left(delta) @ change).expand(4, 6), atol=1e-5, rtol=1e-5)


def test_rank_and_row_space() -> None:
    """rank dW <= r + r_o. The sequential part lies in W's row space; the parallel one reaches outside of it."""
    torch.manual_seed(0)
    model = Net(nn.Linear(14, 12)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(12, 4).double() @ torch.randn(4, 14).double())
    W = model[0].weight.detach().clone()
    delta = hydra(model)
    difference = (delta.weight()[0] - W).detach()
    assert torch.linalg.matrix_rank(difference) == 5
    rows = torch.linalg.svd(W).Vh[:4]
    outside = torch.eye(14, dtype=torch.float64) - rows.T @ rows
    with torch.no_grad():
        delta.B.zero_()
    sequential = (delta.weight()[0] - W).detach()
    assert torch.linalg.matrix_rank(sequential) == 3
    assert (sequential @ outside).norm() < 1e-12 * sequential.norm()
    parallel = difference - sequential
    assert (parallel @ outside).norm() > 0.5 * parallel.norm()


def test_the_first_backward_moves_the_up_projections_only() -> None:
    model = tiny.bert()  # maps with biases
    adapter = graft.attach(model, "hydra", rank=2, output_rank=3)
    model(**tiny.classifier_batches(1)[0]).loss.backward()
    for delta in adapter.deltas.values():
        assert delta.B.grad.any()
        assert delta.D.grad.any()
        assert not delta.A.grad.any()
        assert not delta.C.grad.any()


@pytest.mark.parametrize("head", ["parallel", "sequential"])
def test_starts_of_the_heads(head: str) -> None:
    """Down-projections U(-1/sqrt(n), 1/sqrt(n)) of their own input width n, up-projections zero."""
    (delta,) = graft.attach(layer(40, 300), "hydra", rank=30, output_rank=30).deltas.values()
    down, up, width = (delta.A, delta.B, 300) if head == "parallel" else (delta.C, delta.D, 40)
    assert not up.any()
    assert 0.95 / width**0.5 < down.abs().max() <= 1 / width**0.5
