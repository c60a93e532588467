"""What only LoHa promises: the product of two low-rank matrices, exactly a LoRA of rank r^2, and which factor moves first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.loha import LoHaDelta
from tests import tiny
from tests.methods.small import conv, layer, quiet_peft, randomise

NAMES = ("B1", "A1", "B2", "A2")


def loha(model: nn.Module, seed: int = 1, **options: float) -> LoHaDelta:
    (delta,) = graft.attach(model, "loha", **{"rank": 2, **options}).deltas.values()
    assert isinstance(delta, LoHaDelta)
    randomise(delta, seed)
    return delta


def definition(B1: Tensor, A1: Tensor, B2: Tensor, A2: Tensor, scale: float) -> Tensor:
    return torch.einsum("ia,aj,ib,bj->ij", B1, A1, B2, A2) * scale


def difference(delta: LoHaDelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), alpha=st.floats(0.1, 9))
def test_the_update_is_the_definition(out: int, width: int, rank: int, alpha: float) -> None:
    rank = min(rank, out, width)
    delta = loha(layer(out, width).double(), rank=rank, alpha=alpha)
    torch.testing.assert_close(difference(delta), definition(delta.B1, delta.A1, delta.B2, delta.A2, alpha / rank).detach())


@pytest.mark.parametrize(("out", "width"), [(6, 9), (70, 90)])  # dense, and by two thin factors
def test_outputs_and_gradients_equal_autograd_through_the_definition(out: int, width: int) -> None:
    model = layer(out, width).double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = loha(model, alpha=3.0)
    x = torch.randn(5, width, dtype=torch.float64)
    leaves = [getattr(delta, name).detach().clone().requires_grad_(True) for name in NAMES]
    expected = F.linear(x, W + definition(*leaves, scale=1.5), b)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    for name, gradient in zip(NAMES, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(getattr(delta, name).grad, gradient)


def test_thin_factors_train_without_a_dense_gradient() -> None:
    """Nothing as large as W is kept for the backward pass."""
    model = layer(70, 90)
    loha(model, alpha=3.0)
    kept: list[int] = []
    own = model[0].weight.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(0 if t.data_ptr() == own else t.numel()), t)[1], lambda t: t):
        model(torch.randn(5, 90, requires_grad=True))
    assert 0 < max(kept) < 70 * 90 / 4


def test_it_is_a_lora_of_rank_r_squared() -> None:
    delta = loha(layer(20, 30).double(), rank=3, alpha=2.0)
    assert torch.linalg.matrix_rank(difference(delta)) == 9
    B, A, error = graft.lora_factors(delta)
    assert error == 0
    assert len(A) == 9
    torch.testing.assert_close(B @ A, difference(delta))


def test_with_ones_in_one_product_it_is_lora() -> None:
    model, twin = layer(), layer()
    delta = loha(model, alpha=3.0)
    (lora,) = graft.attach(twin, "lora", rank=2, alpha=3.0).deltas.values()
    with torch.no_grad():
        delta.B1[:], delta.A1[:] = torch.tensor([1.0, 0.0]), torch.tensor([[1.0], [7.0]])
        lora.A.copy_(delta.A2)
        lora.B.copy_(delta.B2)
    x = torch.randn(4, 9)
    torch.testing.assert_close(model(x), twin(x))


def test_the_first_backward_moves_one_factor_only() -> None:
    model = layer()
    (delta,) = graft.attach(model, "loha", rank=2).deltas.values()
    model(torch.randn(4, 9)).square().sum().backward()
    assert [name for name in NAMES if getattr(delta, name).grad.any()] == ["A2"]


def test_starts() -> None:
    """Uniform within 1 / sqrt(columns) of each factor, as FedPara and PEFT have it."""
    (delta,) = graft.attach(layer(300, 400), "loha", rank=25).deltas.values()
    for name, columns in (("B1", 25), ("A1", 400), ("B2", 25)):
        assert 0.95 / columns**0.5 < getattr(delta, name).abs().max() <= 1 / columns**0.5
    assert not delta.A2.any()
    assert not torch.equal(delta.B1, delta.B2)


@quiet_peft
def test_peft_computes_the_same_on_a_grouped_convolution(tmp_path: Path) -> None:
    import peft

    model, x = tiny.conv(), torch.randn(2, 3, 9, 7)
    (delta,) = graft.attach(model, "loha", targets="depthwise", rank=3, alpha=2.0).deltas.values()
    randomise(delta)
    graft.adapters_of(model)["default"].save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.conv(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x))
    assert not torch.allclose(model(x), tiny.conv()(x))


@quiet_peft
def test_peft_s_core_for_kernels_is_refused(tmp_path: Path) -> None:
    import peft

    config = peft.LoHaConfig(target_modules=["blocks.0"], r=3, use_effective_conv2d=True)
    peft.get_peft_model(tiny.conv(), config).save_pretrained(str(tmp_path))
    model = tiny.conv()
    with pytest.raises(graft.GraftError, match="use_effective_conv2d"):
        graft.load_adapter(model, tmp_path)
    assert graft.adapters_of(model) == {}


def test_a_convolution_multiplies_matrices_in_by_kernel() -> None:
    model, x = conv(), torch.randn(2, 4, 5, 5)
    before = model(x)
    delta = loha(model, alpha=3.0)
    kernel = definition(delta.B1, delta.A1, delta.B2, delta.A2, 1.5).view(6, 4, 3, 3)
    torch.testing.assert_close(model(x), before + F.conv2d(x, kernel, padding=1), atol=1e-5, rtol=1e-5)
