"""What only DoRA promises: the norm, the magnitude, and which gradients flow."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.dora import DoRADelta
from tests import tiny
from tests.methods.small import conv, layer


def dora(model: nn.Module, seed: int = 1, **options: object) -> DoRADelta:
    """DoRA on the first module, with random A, B and a magnitude off its start."""
    adapter = graft.attach(model, "dora", targets="0", **options)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, DoRADelta)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (delta.A, delta.B):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        delta.magnitude.mul_(1 + torch.rand(delta.magnitude.shape, generator=generator))
    return delta


def direction(delta: DoRADelta) -> Tensor:
    """V = W + s B A, in fp64."""
    return delta.target.weight().double() + delta.scale * delta.B.detach().double() @ delta.A.detach().double()


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 20), width=st.integers(1, 20), rank=st.integers(1, 20), alpha=st.floats(0.1, 20), seed=st.integers(0, 9))
def test_the_thin_product_norm_is_the_norm(out: int, width: int, rank: int, alpha: float, seed: int) -> None:
    delta = dora(layer(out, width), seed, rank=min(rank, out, width), alpha=alpha)
    torch.testing.assert_close(delta.norm().double(), direction(delta).norm(dim=1), rtol=1e-4, atol=1e-5)


def test_the_norm_of_a_convolution_runs_over_all_other_axes() -> None:
    delta = dora(conv(), rank=3)
    kernel = delta.target.module.weight + (delta.scale * delta.B @ delta.A).view(6, 4, 3, 3)
    torch.testing.assert_close(delta.norm(), kernel.flatten(1).norm(dim=1))


def test_the_norm_of_a_low_precision_base_is_taken_in_fp32() -> None:
    """Rows whose squares overflow fp16 and vanish in bf16's 8 bits."""
    model = layer(4, 300)
    with torch.no_grad():
        model[0].weight.mul_(1000)
    for dtype in (torch.float16, torch.bfloat16):
        delta = dora(copy.deepcopy(model).to(dtype), rank=2)
        assert delta.norm().dtype == torch.float32
        torch.testing.assert_close(delta.norm().double(), direction(delta).norm(dim=1), rtol=1e-5, atol=0)


def test_magnitude_equals_the_norm_at_the_start() -> None:
    adapter = graft.attach(tiny.llama(), "dora", rank=3)
    for delta in adapter.deltas.values():
        torch.testing.assert_close(delta.magnitude.detach(), delta.norm(), rtol=1e-6, atol=0)
        torch.testing.assert_close(delta.magnitude.detach(), delta.target.weight().norm(dim=1))


def test_rows_of_the_merged_weight_have_the_norm_m() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "dora", rank=3)
    tiny.train(model, adapter.optimizer(lr=2e-2, total_steps=4), tiny.causal_batches(), 4)
    for delta in adapter.deltas.values():
        assert (delta.magnitude - delta.target.weight().norm(dim=1)).abs().max() > 1e-3  # it learned
        torch.testing.assert_close(delta.weight()[0].norm(dim=1), delta.magnitude.abs(), rtol=1e-5, atol=1e-6)


def test_with_m_held_at_the_norm_it_is_lora() -> None:
    delta = dora(layer(), rank=3)
    lora = graft.attach(layer(), "lora", rank=3)
    (other,) = lora.deltas.values()
    with torch.no_grad():
        delta.magnitude.copy_(direction(delta).norm(dim=1))
        other.A.copy_(delta.A)
        other.B.copy_(delta.B)
    x = torch.randn(4, 9)
    torch.testing.assert_close(delta(x), other(x))


@pytest.mark.parametrize("make", [layer, conv])
def test_with_the_direction_held_it_is_a_gain_on_each_output(make) -> None:
    """y = (m / ||W||) (x W^T) + b: the bias has no gain."""
    model = make()
    x = torch.randn(2, 4, 5, 5) if make is conv else torch.randn(4, 9)
    plain = model(x)
    delta = dora(model, rank=3)
    gain = torch.linspace(-1, 2, 6)
    with torch.no_grad():
        delta.B.zero_()
        delta.magnitude.copy_(gain * delta.target.weight().norm(dim=1))
    shape = (-1, 1, 1) if make is conv else (-1,)
    bias = model[0].bias.view(shape)
    torch.testing.assert_close(delta(x), gain.view(shape) * (plain - bias) + bias)


def test_the_length_of_a_direction_does_not_matter() -> None:
    """Each row of V times a positive constant, m as it was: the same map."""
    model = layer()
    delta = dora(model, rank=3)
    x = torch.randn(4, 9)
    before = delta(x)
    lengths = torch.linspace(0.1, 30, 6)[:, None]
    with torch.no_grad():
        model[0].weight.mul_(lengths)
        delta.B.mul_(lengths)
    torch.testing.assert_close(delta(x), before)


def test_rows_of_norm_zero_stay_finite() -> None:
    """Pruned models have them; their gain is 0 / 0 where nothing is done about it."""
    model = layer()
    with torch.no_grad():
        model[0].weight[2].zero_()
    adapter = graft.attach(model, "dora", rank=3)
    x = torch.randn(4, 9)
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


# ---- gradients ----------------------------------------------------------------------------------------------------------


def dense_gradient(delta: DoRADelta, x: Tensor) -> Tensor:
    """G' = dL/dW' from autograd on a dense map; L = sum y^2."""
    V = direction(delta)
    W = (delta.magnitude.detach().double()[:, None] * V / V.norm(dim=1, keepdim=True)).requires_grad_(True)
    (G,) = torch.autograd.grad(F.linear(x, W, delta.target.bias).square().sum(), W)
    return G


def test_gradients_with_the_norm_held_constant() -> None:
    """dm_i = <G'_i, V_i> / n_i, and A, B get LoRA's gradients of G' with rows scaled by m / n."""
    delta = dora(layer().double(), rank=3)
    x = torch.randn(5, 9, dtype=torch.float64)
    G, V = dense_gradient(delta, x), direction(delta)
    n = V.norm(dim=1)
    delta(x).square().sum().backward()
    scaled = (delta.magnitude.detach() / n)[:, None] * G
    torch.testing.assert_close(delta.magnitude.grad, (G * V).sum(1) / n)
    torch.testing.assert_close(delta.B.grad, delta.scale * scaled @ delta.A.detach().T)
    torch.testing.assert_close(delta.A.grad, delta.scale * delta.B.detach().T @ scaled)


def test_gradients_with_the_norm_differentiated() -> None:
    """dV_i = (m_i / n_i) (G'_i - its part along V_i): orthogonal to V row by row, so V never grows by itself."""
    delta = dora(layer().double(), rank=3, detach_norm=False)
    x = torch.randn(5, 9, dtype=torch.float64)
    G, V = dense_gradient(delta, x), direction(delta)
    unit = V / V.norm(dim=1, keepdim=True)
    dV = (delta.magnitude.detach() / V.norm(dim=1))[:, None] * (G - (G * unit).sum(1, keepdim=True) * unit)
    torch.testing.assert_close((dV * V).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)
    delta(x).square().sum().backward()
    torch.testing.assert_close(delta.B.grad, delta.scale * dV @ delta.A.detach().T)
    torch.testing.assert_close(delta.A.grad, delta.scale * delta.B.detach().T @ dV)


@pytest.mark.parametrize("make", [layer, conv])
def test_outputs_and_gradients_equal_pefts(make) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's imports warn about their own dependencies
        from peft import LoraConfig, get_peft_model

    delta = dora(make(), rank=3, alpha=5)
    theirs = get_peft_model(make(), LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True))
    module = theirs.base_model.model[0]
    A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
    magnitude = module.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        A.copy_(delta.A.view(A.shape))
        B.copy_(delta.B.view(B.shape))
        magnitude.copy_(delta.magnitude.view(magnitude.shape))
    x = torch.randn(2, 4, 5, 5) if make is conv else torch.randn(4, 9)
    torch.testing.assert_close(delta(x), theirs(x), atol=1e-5, rtol=1e-5)
    delta(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for ours, parameter in ((delta.A, A), (delta.B, B), (delta.magnitude, magnitude)):
        torch.testing.assert_close(ours.grad, parameter.grad.view(ours.shape), atol=1e-3, rtol=1e-4)


def test_the_magnitude_gets_no_weight_decay() -> None:
    """It would decay whole rows of the weight."""
    adapter = graft.attach(tiny.llama(), "dora", rank=3)
    optimizer = adapter.optimizer(lr=1e-3, total_steps=1, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for delta in adapter.deltas.values():
        assert (decay[id(delta.magnitude)], decay[id(delta.A)], decay[id(delta.B)]) == (0.0, 0.1, 0.1)


def test_two_adapters_take_their_norms_from_the_base() -> None:
    """Merged together, each contributes W'_i - W with its norm computed against the unmerged W."""
    model = layer()
    x, parts = torch.randn(4, 9), []
    for name, seed in (("one", 1), ("two", 2)):
        parts.append(dora(layer(), seed, rank=3)(x) - layer()(x))
        dora(model, seed, rank=3, name=name)
    base = layer()(x)
    for name in ("one", "two"):
        graft.adapters_of(model)[name].merge()
    torch.testing.assert_close(model(x), base + parts[0] + parts[1])
