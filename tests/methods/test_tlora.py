"""What only TLoRA promises: tensor rings by brute force, the identity at the start, and a ring whose symmetry is broken."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.tlora import NearIdentity, TLoRADelta, factors
from tests.methods.small import conv, layer, randomise


def tlora(model: nn.Module, seed: int | None = 1, **options: object) -> TLoRADelta:
    (delta,) = graft.attach(model, "tlora", **{"rank": 1, **options}).deltas.values()
    assert isinstance(delta, TLoRADelta)
    if seed is not None:
        randomise(delta, seed)
    return delta


def transform(delta: TLoRADelta) -> Tensor:
    """T entry by entry: the trace of a product of slices."""
    sizes = [len(core) for core in delta.E]
    indices = list(product(*(range(size) for size in sizes)))
    T = torch.zeros(len(indices), len(indices), dtype=torch.float64)
    for row, i in enumerate(indices):
        for column, k in enumerate(indices):
            ring = torch.eye(delta.G.shape[-1], dtype=torch.float64)
            for G, E, here, there in zip(delta.G, delta.E, i, k, strict=True):
                ring = ring @ (E.detach()[here, there] + (G if here == there else 0))
            T[row, column] = ring.trace()
    return T


def residual(delta: TLoRADelta) -> Tensor:
    """D entry by entry."""
    rows, columns = (list(product(*(range(len(core)) for core in cores))) for cores in (delta.P, delta.Q))
    D = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for (row, j), (column, i) in product(enumerate(rows), enumerate(columns)):
        slices = [core.detach()[n] for core, n in zip((*delta.P, *delta.Q), (*j, *i), strict=True)]
        D[row, column] = torch.linalg.multi_dot(slices).trace() if len(slices[0]) > 1 else math.prod(float(s) for s in slices)
    return D


@settings(max_examples=25, deadline=None)
@given(
    out=st.sampled_from([4, 5, 6, 12]), width=st.sampled_from([4, 7, 8, 12]), order=st.integers(1, 3), ring=st.integers(1, 3), rank=st.integers(1, 2)
)
def test_weight_and_both_routes_of_forward_are_the_brute_force(out: int, width: int, order: int, ring: int, rank: int) -> None:
    """y = x T^T W^T + x D^T + b, for a few rows and for many."""
    model = layer(out, width).double()
    delta = tlora(model, order=order, ring=ring, rank=rank)
    T, D, W = transform(delta), residual(delta), model[0].weight.detach()
    torch.testing.assert_close(delta.weight()[0].detach(), W @ T + D)
    torch.testing.assert_close(delta.times(torch.eye(width, dtype=torch.float64)).detach(), T)
    for rows in (1, 40):
        x = torch.randn(rows, width, dtype=torch.float64)
        torch.testing.assert_close(model(x).detach(), x @ T.T @ W.T + x @ D.T + model[0].bias.detach())


def test_a_convolution_is_transformed_as_a_matrix() -> None:
    model, x = conv().double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    delta = tlora(model)
    W = model[0].weight.detach().flatten(1) @ transform(delta) + residual(delta)
    wanted = nn.functional.conv2d(x, W.view(6, 4, 3, 3), model[0].bias, padding=1)
    torch.testing.assert_close(model(x).detach(), wanted.detach())


@settings(max_examples=20, deadline=None)
@given(order=st.integers(1, 4), ring=st.integers(1, 4), seed=st.integers(0, 99))
def test_it_starts_at_the_identity_with_entries_that_differ(order: int, ring: int, seed: int) -> None:
    model = layer(8, 12).double()
    (delta,) = graft.attach(model, "tlora", rank=2, order=order, ring=ring, seed=seed).deltas.values()
    torch.testing.assert_close(delta.times(torch.eye(12, dtype=torch.float64)), torch.eye(12, dtype=torch.float64), atol=1e-13, rtol=0)
    B, A = delta.residual()
    assert not (B @ A).any()
    assert len(set(delta.G.flatten().tolist())) == (delta.G.numel() if ring > 1 else 1)


def kronecker_rank(T: Tensor, first: int, second: int) -> int:
    """How many Kronecker products [first] x [second] T is a sum of."""
    rearranged = T.reshape(first, second, first, second).transpose(1, 2).reshape(first**2, second**2)
    return int(torch.linalg.matrix_rank(rearranged, rtol=1e-6))


def test_the_ring_learns_more_than_a_kronecker_product() -> None:
    """From the paper's start, all entries of a slice alike, it never does."""
    ranks = {}
    for start in ("ours", "the paper's"):
        model = layer(6, 12).double()
        delta = tlora(model, None, order=2, ring=2)
        if start != "ours":
            delta.G.fill_(0.5)
            torch.testing.assert_close(delta.weight()[0], model[0].weight)
        x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        optimizer = torch.optim.Adam(delta.E.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        ranks[start] = kronecker_rank(delta.times(torch.eye(12, dtype=torch.float64)).detach(), 3, 4)
    assert ranks == {"ours": 4, "the paper's": 1}


def test_the_first_backward_moves_the_transform_and_the_first_core_of_the_residual() -> None:
    model = layer(8, 12).double()
    delta = tlora(model, None, rank=2)
    model(torch.randn(9, 12, dtype=torch.float64)).square().sum().backward()
    assert all(core.grad.any() for core in delta.E)
    assert delta.P[0].grad.any()
    assert not any(core.grad.any() for core in (*delta.P[1:], *delta.Q))


def test_the_transform_has_full_rank_and_the_residual_at_most_its_ring_squared() -> None:
    delta = tlora(layer(12, 24).double(), rank=2)
    randomise(delta, size=0.05)
    T = delta.times(torch.eye(24, dtype=torch.float64)).detach()
    assert torch.linalg.matrix_rank(T) == 24
    assert (T - torch.eye(24, dtype=torch.float64)).norm() > 0.1
    assert torch.linalg.matrix_rank(residual(delta)) == 4


def test_one_factor_and_no_ring_is_a_free_matrix() -> None:
    model = layer(4, 6).double()
    delta = tlora(model, None, order=1, ring=1)
    T = torch.randn(6, 6, dtype=torch.float64)
    with torch.no_grad():
        delta.E[0][:, :, 0, 0] = T - torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(delta.weight()[0], model[0].weight @ T)


def test_starts_of_the_residual() -> None:
    """N(0, (c sqrt(r) / (n r))^2) for a core of n slices."""
    (delta,) = graft.attach(layer(4096, 2048), "tlora", rank=8, order=1, ring=1, spread=3.0).deltas.values()
    assert not delta.P[0].any()
    assert float(delta.Q[0].std().detach()) == pytest.approx(3 * math.sqrt(8) / (2048 * 8), rel=0.02)


def test_the_count_of_the_paper_s_shape() -> None:
    """768 = 8 x 8 x 12, R = r = 2: 1088 numbers in the transform and 224 in the residual."""
    assert factors(768, 3) == [8, 8, 12]
    assert graft.methods()["tlora"].cost(768, 768, rank=2, ring=2, order=3) == 1088 + 224


@given(size=st.integers(1, 5000), order=st.integers(1, 5))
def test_factors_multiply_to_the_size(size: int, order: int) -> None:
    found = factors(size, order)
    assert math.prod(found) == size
    assert len(found) == order


def test_the_penalty_reaches_the_optimizer() -> None:
    """lambda sum of the norms of E over (i, k), one for each core and entry (a, b) of the ring; its gradient is zero at the start."""
    adapter = graft.attach(layer(6, 12).double(), "tlora", rank=1, penalty=0.5)
    (delta,), (callback,) = adapter.deltas.values(), adapter.callbacks
    assert isinstance(callback, NearIdentity)
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=1.0), total_steps=3)
    optimizer.step()
    assert not any(core.any() for core in delta.E)
    randomise(delta)
    cores = [core.detach().clone() for core in delta.E]
    wanted = sum(float(core[:, :, a, b].pow(2).sum().sqrt()) for core in cores for a in range(2) for b in range(2))
    assert float(callback.penalty().detach()) == pytest.approx(0.5 * wanted)
    optimizer.zero_grad()
    optimizer.step()
    for core, old in zip(delta.E, cores, strict=True):
        torch.testing.assert_close(core.detach(), old - 0.5 * old / old.pow(2).sum((0, 1)).sqrt())


def test_a_residual_of_more_than_full_rank_is_refused() -> None:
    with pytest.raises(graft.GraftError, match=r"rank squared is 9.*6 x 9"):
        tlora(layer(), rank=3)
