"""What only BOFT promises: butterflies of rotations as PEFT builds them, and how many inputs they connect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.boft import BOFTDelta, structure
from tests import tiny
from tests.methods.small import conv, layer, randomise

quiet = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # PEFT's


def boft(model: nn.Module, **options: Any) -> BOFTDelta:
    (delta,) = graft.attach(model, "boft", **options).deltas.values()
    assert isinstance(delta, BOFTDelta)
    randomise(delta)
    return delta


def peft_rotation(Z: Tensor) -> Tensor:
    """PEFT's ``butterfly_oft_mat`` [in, in], with its own permutations, from Z [m, k, b, b]."""
    from peft.tuners.boft.layer import BOFTLayer

    factors, count, b, _ = Z.shape
    width = count * b
    R = torch.eye(width, dtype=Z.dtype)
    for i in range(factors):
        Q = (Z[i] - Z[i].mT) / 2
        identity = torch.eye(b, dtype=Z.dtype)
        blocks = torch.block_diag(*((identity - q) @ torch.linalg.inv(identity + q) for q in Q))
        order = BOFTLayer.block_butterfly_perm(None, width, count // 2**i, b // 2, factors - 1)
        P = BOFTLayer.perm2mat(None, order).to(Z)
        R = P @ blocks @ P.T @ R
    return R


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 5), half=st.integers(1, 3), factors=st.integers(1, 4), repeats=st.integers(1, 2), bias=st.booleans())
def test_it_is_what_peft_builds(out: int, half: int, factors: int, repeats: int, bias: bool) -> None:
    """PEFT runs y = g (x R) W^T + b. Values and gradients; W' has the angles of W and the lengths of W times |g|."""
    width = 2 * half * 2 ** (factors - 1) * repeats
    model = layer(out, width, bias).double()
    delta = boft(model, block=2 * half, factors=factors)
    assert delta.Z.shape == (factors, width // (2 * half), 2 * half, 2 * half)
    Z, g, W = delta.Z.detach().clone().requires_grad_(True), delta.gains.detach().clone().requires_grad_(True), model[0].weight.detach()
    x, direction = torch.randn(4, width, dtype=torch.float64), torch.randn(4, out, dtype=torch.float64)
    wanted = g * (x @ peft_rotation(Z) @ W.T) + (model[0].bias if bias else 0)
    torch.testing.assert_close(model(x), wanted)
    model(x).backward(direction)
    for ours, theirs in zip((delta.Z, delta.gains), torch.autograd.grad(wanted, (Z, g), direction), strict=True):
        torch.testing.assert_close(ours.grad, theirs)
    adapted = delta.weight()[0]
    torch.testing.assert_close(adapted @ adapted.T, torch.outer(delta.gains, delta.gains) * (W @ W.T))


def test_each_factor_doubles_what_an_input_reaches() -> None:
    for factors in (1, 2, 3, 4):
        model = layer(16, 16)
        nn.init.eye_(model[0].weight)
        assert ((boft(model, block=2, factors=factors).weight()[0].abs() > 1e-6).sum(1) == 2**factors).all()


def test_one_factor_and_no_gains_are_oft() -> None:
    model, twin = layer(6, 9), layer(6, 9)
    delta = boft(model, block=3, factors=1)
    (oft,) = graft.attach(twin, "oft", block=3).deltas.values()
    with torch.no_grad():
        delta.gains.fill_(1)
        oft.q.copy_(((delta.Z[0] - delta.Z[0].mT) / 2)[:, *torch.triu_indices(3, 3, 1)])
    torch.testing.assert_close(delta.weight()[0], oft.weight()[0])


@given(width=st.integers(2, 400), block=st.integers(2, 16), factors=st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_sizes_that_peft_takes_are_taken(width: int, block: int, factors: int) -> None:
    size, count = structure(width, block, factors)
    if width % (block * 2 ** (factors - 1)) == 0 and (factors == 1 or block % 2 == 0):
        assert (size, count) == (block, factors)
    assert 1 <= count <= factors
    assert width % (size * 2 ** (count - 1)) == 0
    assert size >= 2
    assert count == 1 or size % 2 == 0


@quiet
@pytest.mark.parametrize("place", ["llama", "conv"])
def test_peft_computes_the_same_with_one_factor(place: str, tmp_path: Path) -> None:
    import peft

    make, x = (lambda: tiny.llama(bias=True), torch.arange(1, 12)[None]) if place == "llama" else (conv, torch.randn(2, 4, 5, 5))
    model = make()
    adapter = graft.attach(model, "boft", block=4, factors=1)
    for delta in adapter.deltas.values():
        randomise(delta)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    with torch.no_grad():
        ours, wanted = (each(x)[0] if place == "llama" else each(x) for each in (model, theirs))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@quiet
def test_peft_without_cuda_refuses_more_factors(tmp_path: Path) -> None:
    import peft

    graft.attach(layer(6, 8), "boft", block=2, factors=2).save(tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(layer(6, 8), str(tmp_path))


def test_gains_are_not_decayed_and_one_input_is_refused() -> None:
    adapter = graft.attach(layer(), "boft", block=3)
    rotations, gains = adapter.optimizer(lr=0.1, total_steps=1, weight_decay=0.5).param_groups
    assert (rotations["weight_decay"], gains["weight_decay"]) == (0.5, 0)
    assert gains["params"][0].shape == (6,)
    with pytest.raises(graft.GraftError, match="one input"):
        graft.attach(layer(5, 1), "boft")
