"""What only RoAd promises: which outputs are pairs, and what each variant lets them have of their own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.road import RoAdDelta
from tests import tiny
from tests.methods.small import conv, layer, randomise


def road(model: nn.Module, **options: Any) -> RoAdDelta:
    (delta,) = graft.attach(model, "road", **options).deltas.values()
    assert isinstance(delta, RoAdDelta)
    randomise(delta)
    return delta


def matrix(theta: Tensor, alpha: Tensor, out: int, group: int, variant: str) -> Tensor:
    """R, pair by pair."""
    R, half = torch.eye(out, dtype=theta.dtype), group // 2
    for start in range(0, out - out % 2, group):
        for q in range(half):
            for own, partner, sign in ((start + q, start + q + half, -1), (start + q + half, start + q, 1)):
                if variant == "road_1":
                    one = two = start // 2 + q
                elif variant == "road_2":
                    one = two = own
                else:
                    one = 2 * start + own - start
                    two = one + group
                R[own, own] = alpha[one] * theta[one].cos()
                R[own, partner] = sign * alpha[two] * theta[two].sin()
    return R


@settings(max_examples=30, deadline=None)
@given(
    half=st.integers(1, 3),
    groups=st.integers(1, 3),
    odd=st.booleans(),
    width=st.integers(1, 5),
    bias=st.booleans(),
    variant=st.sampled_from(["road_1", "road_2", "road_4"]),
)
def test_pair_by_pair(half: int, groups: int, odd: bool, width: int, bias: bool, variant: str) -> None:
    """y = R (W x + b), values and gradients; the last of an odd number of outputs stays."""
    out = 2 * half * groups + odd
    model = layer(out, width, bias).double()
    delta = road(model, variant=variant, group=2 * half)
    theta, alpha = (p.detach().clone().requires_grad_(True) for p in (delta.theta, delta.alpha))
    x, direction = torch.randn(4, width, dtype=torch.float64), torch.randn(4, out, dtype=torch.float64)
    R = matrix(theta, alpha, out, 2 * half, variant)
    wanted = F.linear(x, model[0].weight, model[0].bias) @ R.T
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(F.linear(x, *delta.weight()), wanted)
    model(x).backward(direction)
    for ours, theirs in zip((delta.theta, delta.alpha), torch.autograd.grad(wanted, (theta, alpha), direction), strict=True):
        torch.testing.assert_close(ours.grad, theirs)


def test_a_right_angle_exchanges_the_halves_of_a_group() -> None:
    model = layer(8, 3, bias=False)
    delta = road(model, group=4)
    with torch.no_grad():
        delta.theta.fill_(math.pi / 2)
        delta.alpha.fill_(2)
    W = model[0].weight.detach()
    torch.testing.assert_close(delta.weight()[0], 2 * torch.cat([-W[2:4], W[:2], -W[6:], W[4:6]]), rtol=0, atol=1e-6)


@given(out=st.integers(2, 60), group=st.integers(2, 40))
@settings(max_examples=30, deadline=None)
def test_the_group_is_the_largest_even_divisor(out: int, group: int) -> None:
    assert road(layer(out, 2), group=group).group == max(g for g in range(2, group + 1, 2) if (out - out % 2) % g == 0)


def test_a_convolution_turns_its_channels() -> None:
    model, x = conv(), torch.randn(2, 4, 5, 5)
    h = model(x)
    delta = road(model, group=6)
    R = matrix(delta.theta.detach(), delta.alpha.detach(), 6, 6, "road_1")
    torch.testing.assert_close(model(x), torch.einsum("oc,bchw->bohw", R, h), rtol=1e-5, atol=1e-5)


def test_nothing_is_decayed_and_one_output_is_refused() -> None:
    (group,) = graft.attach(layer(), "road").optimizer(lr=0.1, total_steps=1, weight_decay=0.5).param_groups
    assert group["weight_decay"] == 0
    with pytest.raises(graft.GraftError, match="one output"):
        graft.attach(layer(1, 5), "road")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_refuses_what_it_would_group_otherwise(tmp_path: Path) -> None:
    import peft

    adapter = graft.attach(tiny.llama(), "road", group=10)
    assert len({delta.layout["group"] for delta in adapter.deltas.values()}) > 1
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match="divisible by group_size"):
        peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path))
