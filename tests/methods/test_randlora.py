"""What only RandLoRA promises: full rank from a few numbers on shared frozen bases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.randlora import RandLoRADelta
from tests import tiny
from tests.methods.small import Net, layer, randomise

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def one(model: nn.Module, seed: int = 1, **options: object) -> RandLoRADelta:
    (delta,) = graft.attach(model, "randlora", **options).deltas.values()
    assert isinstance(delta, RandLoRADelta)
    randomise(delta, seed)
    return delta


def by_terms(delta: RandLoRADelta, lambda_: Tensor, gamma: Tensor) -> Tensor:
    """dW, one random direction after the other: column q of the flattened B, row q of the flattened A, paired as PEFT does."""
    bases = delta.shared
    (r, n), m, M = lambda_.shape, min(delta.target.shape), max(delta.target.shape)
    total = lambda_.new_zeros(M, m)
    for q in range(r * n):
        j, k = divmod(q, r)  # B is flattened as (n, r)
        i, t = divmod(q, n)  # A is flattened as (r, n)
        row = lambda_[i, t] * bases.randlora_A[i, 0, :m].to(gamma) * gamma[t]
        total = total + torch.outer(bases.randlora_B[:M, j, k].to(gamma), row)
    out, width = delta.target.shape
    return delta.scale * (total if out >= width else total.T)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 9), seed=st.integers(0, 3))
def test_values_and_gradients_equal_the_sum_over_terms(shape: tuple[int, int], rank: int, seed: int) -> None:
    """Tall, wide, square; r that divides min(out, in) or not."""
    model = layer(*shape).double()
    delta = one(model, seed, rank=min(rank, *shape))
    lambda_, gamma = (p.detach().clone().requires_grad_(True) for p in (delta.lambda_, delta.gamma))
    wanted = model[0].weight + by_terms(delta, lambda_, gamma)
    torch.testing.assert_close(delta.weight()[0], wanted)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ wanted.T + model[0].bias)
    model(x).square().sum().backward()
    (x @ wanted.T + model[0].bias).square().sum().backward()
    torch.testing.assert_close(delta.lambda_.grad, lambda_.grad)
    torch.testing.assert_close(delta.gamma.grad, gamma.grad)


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, rank=st.integers(1, 9))
def test_the_update_has_full_rank_and_n_times_r_plus_m_numbers(shape: tuple[int, int], rank: int) -> None:
    rank, m = min(rank, *shape), min(shape)
    delta = one(layer(*shape).double(), rank=rank)
    n = math.ceil(m / rank)
    assert sum(p.numel() for p in delta.parameters()) == n * (rank + m)
    B, A = delta.factors()
    assert torch.linalg.matrix_rank(B @ A, rtol=1e-10) == m


def test_one_base_alone_gives_rank_r() -> None:
    """lambda zero but for one column: the other terms vanish."""
    delta = one(layer(12, 10).double(), rank=3)
    with torch.no_grad():
        delta.lambda_[:, 1:] = 0
    B, A = delta.factors()
    assert torch.linalg.matrix_rank(B @ A, rtol=1e-10) == 3


def test_the_first_backward_moves_lambda_only() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "randlora", rank=5)
    model(**tiny.causal_batches(1)[0]).loss.backward()
    for delta in adapter.deltas.values():
        assert not delta.lambda_.any()
        assert torch.equal(delta.gamma, torch.full_like(delta.gamma, 1 / max(delta.gamma.shape)))
        assert delta.lambda_.grad.any()
        assert not delta.gamma.grad.any()


def test_all_layers_read_one_pair_of_bases() -> None:
    """The same storage everywhere, sized for the largest target, frozen, and no part of what is trained."""
    model = tiny.llama()
    adapter = graft.attach(model, "randlora", rank=5)
    assert len({id(delta.shared) for delta in adapter.deltas.values()}) == 1
    pointers = {(b.randlora_A.data_ptr(), b.randlora_B.data_ptr()) for b in (d.shared for d in adapter.deltas.values())}
    assert len(pointers) == 1
    bases = adapter.shared
    assert bases.randlora_A.shape == (5, 1, 52)  # as PEFT: over all targets the largest out and the largest in are both the MLP's 52
    assert bases.randlora_B.shape == (52, 11, 5)
    model(**tiny.causal_batches(1)[0]).loss.backward()
    assert not any(b.requires_grad or b.grad is not None for b in bases.buffers())
    assert not list(bases.parameters())
    assert all(p.ndim == 2 and p.numel() < 500 for p in adapter.parameters())


@pytest.mark.parametrize("kind", ["uniform", "sparse", "very sparse"])
def test_distribution_of_the_bases(kind: str) -> None:
    """Unit deviation; uniform is flat, the sparse ones take three values with P(0) = 1 - 1/s, s = 3 or sqrt(m)."""
    bases = graft.attach(Net(nn.Linear(400, 100)), "randlora", rank=10, bases=kind).shared
    for base in (bases.randlora_A, bases.randlora_B):
        assert base.dtype == torch.float32
        assert abs(base.std() - 1) < 1e-4
        assert abs(base.mean()) < 0.1
        if kind == "uniform":
            assert abs(base.abs().max() - math.sqrt(3)) < 0.05
            continue
        assert len(base.unique()) == 3
        assert abs((base == 0).float().mean() - (1 - 1 / {"sparse": 3, "very sparse": 10}[kind])) < 0.04


def test_bases_come_from_the_seed_alone() -> None:
    def bases(seed: int) -> Tensor:
        torch.manual_seed(torch.randint(0, 99, ()).item())
        return graft.attach(layer(12, 10), "randlora", rank=3, seed=seed).shared.randlora_B

    assert torch.equal(bases(1), bases(1))
    assert not torch.equal(bases(1), bases(2))


def test_tiny_and_empty_bases_stay_finite() -> None:
    """A deviation of one number, or of zeros that a sparse draw can give, must not divide by zero."""
    for seed in range(12):
        bases = graft.attach(layer(1, 1), "randlora", rank=1, bases="very sparse", seed=seed).shared
        assert all(b.isfinite().all() for b in bases.buffers())


def test_scale_rules() -> None:
    """authors: alpha / r / sqrt(n) with alpha = 2 r; peft: alpha / r with alpha = 20 r; here r = 3, n = 4."""

    def scale(**options: object) -> float:
        return one(layer(12, 10), rank=3, **options).scale

    assert scale() == pytest.approx(2 / math.sqrt(4))
    assert scale(alpha=12.0) == pytest.approx(12 / 3 / math.sqrt(4))
    assert scale(scale_rule="peft") == pytest.approx(20)
    assert scale(scale_rule="peft", alpha=12.0) == pytest.approx(4)


def test_a_flat_spectrum_is_learned_where_lora_cannot() -> None:
    """The paper's claim on its own ground: at fewer parameters, a full-rank target is fitted better; a rank-2 one is not."""
    torch.manual_seed(0)
    x = torch.randn(256, 24)
    flat = torch.linalg.qr(torch.randn(24, 24)).Q
    errors = {}
    for method, rank in (("randlora", 3), ("lora", 5)):
        model = layer(24, 24, bias=False)
        y = x @ (model[0].weight.detach() + 0.3 * flat).T
        adapter = graft.attach(model, method, rank=rank)
        errors[method, "size"] = adapter.parameter_count
        optimizer = adapter.optimizer(lr=2e-2, total_steps=300)
        for _ in range(300):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[method] = loss.item()
    assert errors["randlora", "size"] < errors["lora", "size"]
    assert errors["randlora"] < 0.9 * errors["lora"]
