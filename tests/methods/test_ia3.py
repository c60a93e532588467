"""What only (IA)3 promises: gains, on which side of which map, and one for each channel of a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.methods.deltas.ia3 import IA3Delta
from tests import tiny
from tests.methods.small import Net, conv, layer, randomise


def ia3(model: nn.Module, inputs: str) -> IA3Delta:
    (delta,) = graft.attach(model, "ia3", inputs=inputs).deltas.values()
    assert isinstance(delta, IA3Delta)
    randomise(delta)
    return delta


@settings(max_examples=20, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), bias=st.booleans())
def test_closed_forms_and_gradients(out: int, width: int, bias: bool) -> None:
    """On the outputs y = g (W x + b), so that the bias is scaled too; on the inputs y = W (g x) + b."""
    x, direction = torch.randn(5, width, dtype=torch.float64), torch.randn(5, out, dtype=torch.float64)
    for inputs in ("all", "none"):
        model = layer(out, width, bias).double()
        delta = ia3(model, inputs)
        g = delta.gains.detach().clone().requires_grad_(True)
        W, b = model[0].weight, model[0].bias
        wanted = F.linear(x * g, W, b) if inputs == "all" else F.linear(x, W, b) * g
        torch.testing.assert_close(model(x), wanted)
        torch.testing.assert_close(F.linear(x, *delta.weight()), wanted)
        model(x).backward(direction)
        torch.testing.assert_close(delta.gains.grad, torch.autograd.grad(wanted, g, direction)[0])


def test_roles_decide_the_side() -> None:
    adapter = graft.attach(tiny.llama(), "ia3")
    for name, delta in adapter.deltas.items():
        out_features, in_features = delta.target.shape
        assert len(delta.gains) == (in_features if name.endswith("down_proj") else out_features)
        assert torch.all(delta.gains == 1)
    assert adapter.parameter_count == adapter.recipe.delta.total([delta.target for delta in adapter.deltas.values()])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_has_one_gain_for_each_channel(groups: int) -> None:
    x = torch.randn(2, 4, 5, 5)
    for inputs, count in (("all", 4), ("none", 6)):
        model = Net(nn.Conv2d(4, 6, 3, padding=1, groups=groups))
        delta = ia3(model, inputs)
        g = delta.gains.detach().view(-1, 1, 1)
        assert len(g) == count
        maps = model[0]
        plain = F.conv2d(x * g if inputs == "all" else x, maps.weight, maps.bias, padding=1, groups=groups)
        wanted = plain if inputs == "all" else plain * g
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)
        weight, bias = delta.weight()
        merged = F.conv2d(x, weight.view(maps.weight.shape), bias, padding=1, groups=groups)
        torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


def test_gains_are_not_decayed() -> None:
    adapter = graft.attach(conv(), "ia3")
    (group,) = adapter.optimizer(lr=0.1, total_steps=1, weight_decay=0.5).param_groups
    assert group["weight_decay"] == 0


def test_a_role_that_is_not_there_is_refused() -> None:
    with pytest.raises(graft.GraftError, match="inputs is 'up'"):
        graft.attach(layer(), "ia3", inputs="up")
