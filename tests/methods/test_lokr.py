"""What only LoKr promises: a Kronecker product entry by entry, split and decomposed by PEFT's rules, applied without being formed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.lokr import LoKr, LoKrDelta
from tests import tiny
from tests.methods.small import Net, layer, quiet_peft, randomise

factors = st.one_of(st.none(), st.integers(1, 40))


def lokr(model: nn.Module, seed: int = 1, **options: object) -> LoKrDelta:
    (delta,) = graft.attach(model, "lokr", **options).deltas.values()
    assert isinstance(delta, LoKrDelta)
    randomise(delta, seed)
    return delta


def leaves(delta: LoKrDelta) -> dict[str, Tensor]:
    return {name: value.detach().clone().requires_grad_(True) for name, value in delta.named_parameters()}


def definition(own: dict[str, Tensor], scale: float) -> Tensor:
    """dW[i k + p, j n + q] = s C[i, j] D[p, q]."""
    C, D = (own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in "CD")
    return torch.einsum("ij,pq->ipjq", C, D).reshape(len(C) * len(D), -1) * scale


@settings(max_examples=40, deadline=None)
@given(out=st.integers(1, 40), width=st.integers(1, 40), rank=st.integers(1, 9), factor=factors, both=st.booleans(), alpha=st.floats(0.1, 9))
def test_outputs_and_gradients_equal_autograd_through_the_definition(
    out: int, width: int, rank: int, factor: int | None, both: bool, alpha: float
) -> None:
    model = layer(out, width).double()
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    delta = lokr(model, rank=rank, factor=factor, both=both, alpha=alpha)
    x, own = torch.randn(2, 3, width, dtype=torch.float64), leaves(delta)
    expected = F.linear(x, W + definition(own, alpha / rank), b)
    torch.testing.assert_close(model(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model(x[:1, 0]), expected[:1, 0])
    model(x).square().sum().backward()
    for (name, parameter), gradient in zip(delta.named_parameters(), torch.autograd.grad(expected.square().sum(), list(own.values())), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, msg=name)


@given(size=st.integers(1, 3000), factor=factors)
def test_sides_are_split_as_peft_splits_them(size: int, factor: int | None) -> None:
    from peft.tuners.lokr.layer import factorization

    left = LoKr(factor=factor).split(size)
    assert (left, size // left) == factorization(size, factor or -1)


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 60), width=st.integers(1, 60), rank=st.integers(1, 12), factor=factors, both=st.booleans())
def test_the_same_factors_as_peft(out: int, width: int, rank: int, factor: int | None, both: bool) -> None:
    import peft

    config = peft.LoKrConfig(target_modules=["maps.0"], r=rank, decompose_both=both, decompose_factor=factor or -1)
    theirs = peft.get_peft_model(layer(out, width), config)
    expected = {name.rpartition("lokr_")[2].split(".")[0]: tuple(p.shape) for name, p in theirs.named_parameters() if "lokr_" in name}
    delta = lokr(layer(out, width), rank=rank, factor=factor, both=both)
    keys = LoKr.peft.keys
    assert {keys[name].removeprefix("lokr_"): tuple(p.shape) for name, p in delta.named_parameters()} == expected


def test_nothing_as_large_as_the_weight_is_kept() -> None:
    model = layer(64, 96)
    lokr(model)
    kept: list[int] = []
    own = model[0].weight.data_ptr()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(0 if t.data_ptr() == own else t.numel()), t)[1], lambda t: t):
        model(torch.randn(5, 96, requires_grad=True))
    assert 0 < max(kept) < 64 * 96 / 4


def test_with_a_left_factor_of_one_number_it_is_lora() -> None:
    model, twin = layer(20, 30), layer(20, 30)
    delta = lokr(model, rank=3, alpha=2.0, factor=1)
    (lora,) = graft.attach(twin, "lora", rank=3, alpha=2.0).deltas.values()
    with torch.no_grad():
        delta.C.fill_(1.0)
        lora.A.copy_(delta.D_b)
        lora.B.copy_(delta.D_a)
    x = torch.randn(4, 30)
    torch.testing.assert_close(model(x), twin(x), atol=1e-5, rtol=1e-5)


def test_the_rank_is_the_product_of_the_ranks() -> None:
    delta = lokr(layer(24, 36).double(), rank=2, factor=4)  # C [4, 4], D [6, 9] of rank 2
    assert torch.linalg.matrix_rank((delta.weight()[0] - delta.target.weight()).detach()) == 8


@pytest.mark.parametrize(("rank", "moved"), [(1, ["D_b"]), (99, ["D"])])
def test_the_first_backward_moves_the_factor_that_starts_at_zero(rank: int, moved: list[str]) -> None:
    model = layer(24, 36)
    (delta,) = graft.attach(model, "lokr", rank=rank).deltas.values()
    model(torch.randn(4, 36)).square().sum().backward()
    assert [name for name, p in delta.named_parameters() if p.grad.any()] == moved
    assert 0.8 / 6**0.5 < delta.C.abs().max() <= 1 / 6**0.5


@quiet_peft
@pytest.mark.parametrize("rank", [2, 99])
def test_convolutions_are_split_along_channels(rank: int, tmp_path: Path) -> None:
    """Kernel positions stay whole in D; PEFT agrees on a grouped convolution, too; the count before attaching is exact."""
    import peft

    model, x = tiny.conv(), torch.randn(2, 3, 9, 7)
    adapter = graft.attach(model, "lokr", targets="conv", rank=rank)
    for delta in adapter.deltas.values():
        randomise(delta)
    assert adapter.recipe.delta.total([delta.target for delta in adapter.deltas.values()]) == adapter.parameter_count
    second = adapter.deltas["blocks.2"]  # 14 x 10 channels, 3 x 3
    own = leaves(second)
    C, D = own["C"], own["D"] if rank == 99 else own["D_a"] @ own["D_b"]
    assert (C.shape, D.shape) == ((2, 2), (7, 5 * 9))
    kernel = torch.einsum("ij,pqhw->ipjqhw", C, D.view(7, 5, 3, 3)).reshape(14, 10, 3, 3)
    torch.testing.assert_close(second.weight()[0], second.target.weight() + kernel.flatten(1))
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.conv(), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(x), model(x))
    loaded = tiny.conv()
    graft.load_adapter(loaded, tmp_path)
    assert torch.equal(loaded(x), model(x))


@quiet_peft
def test_peft_s_core_for_kernels_is_refused(tmp_path: Path) -> None:
    import peft

    config = peft.LoKrConfig(target_modules=["blocks.2"], r=2, use_effective_conv2d=True)
    peft.get_peft_model(tiny.conv(), config).save_pretrained(str(tmp_path))
    with pytest.raises(graft.GraftError, match="use_effective_conv2d"):
        graft.load_adapter(tiny.conv(), tmp_path)


def test_prime_sides_have_a_left_factor_of_one() -> None:
    delta = lokr(Net(nn.Linear(31, 37)).eval(), rank=2)
    assert delta.C.shape == (1, 1)
    assert delta.layout["left"] == [1, 1]
