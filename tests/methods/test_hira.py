"""What only HiRA promises: an update in proportion to W, entry by entry, of a rank far above r."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.hira import HiRADelta
from tests.methods.small import Net, conv, layer, randomise


def hira(model: nn.Module, rank: int = 2, seed: int = 1, **options: object) -> HiRADelta:
    (delta,) = graft.attach(model, "hira", rank=rank, **options).deltas.values()
    assert isinstance(delta, HiRADelta)
    randomise(delta, seed)
    return delta


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 7), width=st.integers(1, 7), rank=st.integers(1, 7), bias=st.booleans())
def test_every_entry_of_the_weight(out: int, width: int, rank: int, bias: bool) -> None:
    model = layer(out, width, bias).double()
    W = model[0].weight.detach().clone()
    delta = hira(model, min(rank, out, width))
    got, A, B = delta.weight()[0].detach(), delta.A.tolist(), delta.B.tolist()
    for i in range(out):
        for j in range(width):
            factor = 1 + sum(B[i][k] * A[k][j] for k in range(len(A)))
            assert abs(float(got[i, j]) - float(W[i, j]) * factor) < 1e-12
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(model(x), F.linear(x, got, model[0].bias))


def test_gradients_equal_autograd_through_the_definition() -> None:
    model = layer().double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = hira(model)
    x = torch.randn(5, 9, dtype=torch.float64)
    A, B = (p.detach().clone().requires_grad_(True) for p in (delta.A, delta.B))
    wanted = torch.autograd.grad(F.linear(x, W * (1 + torch.einsum("ik,kj->ij", B, A)), b).square().sum(), (A, B))
    model(x).square().sum().backward()
    for p, gradient in zip((delta.A, delta.B), wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_on_a_weight_of_ones_it_is_lora() -> None:
    model, twin = layer(), layer()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        twin[0].weight.fill_(1.0)
    delta = hira(model)
    (lora,) = graft.attach(twin, "lora", rank=2, alpha=2.0).deltas.values()
    with torch.no_grad():
        lora.A.copy_(delta.A)
        lora.B.copy_(delta.B)
    x = torch.randn(4, 9)
    torch.testing.assert_close(model(x), twin(x))


def difference(delta: HiRADelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


def test_rank_and_zeros() -> None:
    """rank dW <= r rank W, which random factors attain; entries of W that are zero stay zero."""
    torch.manual_seed(0)
    model = Net(nn.Linear(14, 12)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(12, 4).double() @ torch.randn(4, 14).double())
    assert torch.linalg.matrix_rank(difference(hira(model, 2))) == 8
    graft.detach(model)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(12, 14).double() * (torch.rand(12, 14) < 0.5))
    delta = hira(model, 1)
    assert torch.linalg.matrix_rank(difference(delta)) > 8
    assert torch.equal(delta.weight()[0] == 0, model[0].weight == 0)


def test_a_convolution_is_multiplied_at_every_kernel_position() -> None:
    model = conv()
    delta, x = hira(model), torch.randn(2, 4, 5, 5)
    kernel = model[0].weight * (1 + torch.einsum("ok,kihw->oihw", delta.B, delta.A.view(2, 4, 3, 3)))
    torch.testing.assert_close(model(x), F.conv2d(x, kernel, model[0].bias, padding=1), atol=1e-5, rtol=1e-5)


def test_starts() -> None:
    (delta,) = graft.attach(layer(40, 300), "hira", rank=30).deltas.values()
    assert not delta.B.any()
    assert 0.95 / 300**0.5 < delta.A.abs().max() <= 1 / 300**0.5
    (table,) = graft.attach(Net(nn.Embedding(50, 40)), "hira", rank=30, targets="all").deltas.values()
    assert not table.A.any()
    assert table.B.shape == (40, 30)
    assert 0.9 < table.B.std() < 1.1
