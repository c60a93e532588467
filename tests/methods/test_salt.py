"""What only SALT promises: the core in W's singular basis, where ReLU cuts, the penalty and its special cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.salt import Penalty, SALTDelta
from tests.methods.small import conv, layer, randomise

SCOPES = ["diag", "all", "none"]


def salt(model: nn.Module, seed: int | None = 1, **options: object) -> SALTDelta:
    (delta,) = graft.attach(model, "salt", **{"rank": 2, "scaled": 3, **options}).deltas.values()
    assert isinstance(delta, SALTDelta)
    if seed is not None:
        randomise(delta, seed)
    return delta


def by_the_paper(delta: SALTDelta, scope: str) -> Tensor:
    """U phi(M) V^T with M written out in full; torch's own decomposition of W."""
    U, S, V = torch.linalg.svd(delta.target.weight().to(delta.target.dtype), full_matrices=False)
    rho = len(delta.alpha)
    top, rest = torch.diag(delta.alpha * S[:rho] + delta.beta), torch.diag(S[rho:]) + delta.X @ delta.Y
    if scope == "diag":
        top = top.clamp(min=0)
    M = torch.block_diag(top, rest)
    # X Y lives in the basis of the rest: only where singular vectors' signs agree does it mean the same matrix
    signs = torch.cat([torch.sign((U.T[i] * delta.U.T[i]).sum())[None] for i in range(len(S))])
    return (U * signs) @ (M.clamp(min=0) if scope == "all" else M) @ (signs[:, None] * V)


@pytest.mark.parametrize("scope", SCOPES)
@settings(max_examples=15, deadline=None)
@given(out=st.integers(1, 8), width=st.integers(1, 8), rank=st.integers(1, 8), scaled=st.integers(0, 8), seed=st.integers(0, 99))
def test_the_weight_is_the_paper_s(scope: str, out: int, width: int, rank: int, scaled: int, seed: int) -> None:
    model, least = layer(out, width, seed=seed).double(), min(out, width)
    delta = salt(model, seed, rank=min(rank, least), scaled=min(scaled, least), relu_scope=scope)
    torch.testing.assert_close(delta.weight()[0], by_the_paper(delta, scope), atol=1e-9, rtol=1e-9)
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ by_the_paper(delta, scope).T + model[0].bias, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("options", [{}, {"scaled": None, "rank": 1}, {"scaled": 0}, {"scaled": 6}])
def test_it_starts_exactly_at_the_base(scope: str, options: dict[str, int | None]) -> None:
    model = layer()
    delta = salt(model, None, relu_scope=scope, **options)
    assert torch.equal(delta.weight()[0], model[0].weight)
    assert delta.X.numel() == 0 or delta.X.abs().max() > 0  # so that Y learns from the first update on


def test_the_first_gradients() -> None:
    """alpha, beta and Y learn at once, X as soon as Y is not zero."""
    model = layer()
    delta = salt(model, None)
    model(torch.randn(4, 9)).square().sum().backward()
    assert all(p.grad.abs().min() > 0 for p in (delta.alpha, delta.beta, delta.Y))
    assert not delta.X.grad.any()


def test_relu_on_the_diagonal_keeps_the_gradient_of_negative_entries() -> None:
    """dL/d(X Y) through W' = U M V^T is U_2^T G V_2 where phi does not reach, and zero at negative entries of M where it does."""
    gradients = {}
    for scope in ("diag", "all"):
        delta = salt(layer().double(), relu_scope=scope)
        direction = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (delta.weight()[0] * direction).sum().backward()
        core = delta.U[:, 3:].T @ direction @ delta.V[3:].T
        M = delta.S[3:].diag() + delta.X @ delta.Y
        assert (M < 0).any()
        reached = core if scope == "diag" else core * (M > 0)
        torch.testing.assert_close(delta.X.grad, (reached @ delta.Y.T).detach())
        torch.testing.assert_close(delta.Y.grad, (delta.X.T @ reached).detach())
        gradients[scope] = delta.X.grad
    assert (gradients["diag"] - gradients["all"]).norm() > 0.1


def test_all_scaled_is_scale_and_shift_of_the_singular_values() -> None:
    model = layer(8, 5).double()
    delta = salt(model, scaled=5)
    U, S, V = torch.linalg.svd(model[0].weight, full_matrices=False)
    torch.testing.assert_close(delta.weight()[0], (U * (delta.alpha * S + delta.beta).clamp(min=0)) @ V)
    assert graft.methods()["salt"].cost(8, 5, rank=2, scaled=5) == 10


def test_none_scaled_is_a_low_rank_update_in_the_singular_basis() -> None:
    model = layer(8, 7).double()
    delta = salt(model, scaled=0, relu_scope="none")
    update = (delta.weight()[0] - model[0].weight).detach()
    torch.testing.assert_close(update, (delta.U @ delta.X @ delta.Y @ delta.V).detach())
    assert torch.linalg.matrix_rank(update) == 2


def test_rank_and_the_frozen_basis() -> None:
    model = layer(12, 10).double()
    delta = salt(model)
    before = {name: value.clone() for name, value in delta.named_buffers()}
    assert before.keys() == {"U", "S", "V"}
    assert torch.linalg.matrix_rank((delta.weight()[0] - model[0].weight).detach()) == 5
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)
    model(torch.randn(4, 10, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in delta.named_buffers())


def test_a_convolution_is_decomposed_as_a_matrix() -> None:
    model = conv().double()
    delta = salt(model, scaled=None, rank=1)
    assert len(delta.alpha) == 4  # all but two of the 6 singular values of 6 x 36
    torch.testing.assert_close(delta.weight()[0], by_the_paper(delta, "diag"))


@pytest.mark.parametrize("squared", [True, False])
def test_the_penalty_reaches_the_optimizer(squared: bool) -> None:
    """It is zero with gradient zero at the base; later lambda (||.||^2 + ||.||^2), or plain norms, over all targets."""
    model = nn.Sequential(nn.Linear(9, 6), nn.Linear(6, 7)).double()
    adapter = graft.attach(model, "salt", targets="all", rank=2, scaled=3, penalty=0.3, squared=squared)
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=1.0), total_steps=3)
    (callback,) = adapter.callbacks
    assert isinstance(callback, Penalty)
    assert float(callback.penalty().detach()) == 0
    start = [p.detach().clone() for p in adapter.parameters()]
    optimizer.step()  # with no gradient but the penalty's
    assert all(torch.equal(p, old) for p, old in zip(adapter.parameters(), start, strict=True))
    randomise(nn.ModuleList(adapter.deltas.values()), size=0.3)
    parameters = [p.detach().clone().requires_grad_(True) for p in adapter.parameters()]
    wanted = torch.zeros((), dtype=torch.float64)
    for (alpha, beta, X, Y), delta in zip((parameters[:4], parameters[4:]), adapter.deltas.values(), strict=True):
        for part in ((alpha * delta.S[:3] + beta).clamp(min=0) - delta.S[:3], X @ Y):
            wanted = wanted + (part.pow(2).sum() if squared else part.pow(2).sum().sqrt())
    gradients = torch.autograd.grad(0.3 * wanted, parameters)
    assert float(callback.penalty().detach()) == pytest.approx(0.3 * float(wanted.detach()))
    optimizer.zero_grad()
    optimizer.step()
    for p, old, gradient in zip(adapter.parameters(), parameters, gradients, strict=True):
        torch.testing.assert_close(p.detach(), (old - gradient).detach())


def test_without_a_penalty_there_is_no_callback() -> None:
    assert graft.attach(layer(), "salt", rank=2).callbacks == []


def test_more_than_the_matrix_has_is_refused() -> None:
    with pytest.raises(graft.GraftError, match=r"scaled is 7.*6 x 9"):
        salt(layer(), scaled=7)
