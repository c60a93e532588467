"""What only S2-LoRA promises: one pair a shape, whose ranks each target switches off for itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graft
from graft.methods.deltas.s2_lora import S2LoRADelta
from tests.methods.small import Net


def net() -> Net:
    torch.manual_seed(0)
    return Net(nn.Linear(9, 6), nn.Linear(6, 9), nn.Linear(9, 6)).eval()


def attached(model: nn.Module, **options: object) -> tuple[graft.Adapter, list[S2LoRADelta]]:
    adapter = graft.attach(model, "s2-lora", rank=3, **options)
    return adapter, list(adapter.deltas.values())


def test_targets_of_one_shape_share_a_pair_and_its_gradient() -> None:
    model = net().double()
    adapter, deltas = attached(model)
    pairs = dict(adapter.shared.named_parameters())
    assert {name: tuple(p.shape) for name, p in pairs.items()} == {"B_6x9": (6, 3), "A_6x9": (3, 9), "B_9x6": (9, 3), "A_9x6": (3, 6)}
    assert len(adapter.parameters()) == 4 + 3
    assert adapter.parameter_count == adapter.recipe.delta.total([d.target for d in deltas]) == 2 * 3 * 15 + 9
    with torch.no_grad():
        for delta in deltas:
            delta.s.copy_(torch.randn(3))
    x = torch.randn(5, 9, dtype=torch.float64)
    B, A, b, a = (pairs[name].detach().clone().requires_grad_(True) for name in ("B_6x9", "A_6x9", "B_9x6", "A_9x6"))
    h, maps = x, [model[i] for i in range(3)]
    for delta, module, (left, right) in zip(deltas, maps, ((B, A), (b, a), (B, A)), strict=True):
        h = F.linear(h, module.weight + left @ torch.diag(delta.s.detach()) @ right, module.bias)
    torch.testing.assert_close(model(x), h)
    h.square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(pairs["B_6x9"].grad, B.grad)
    torch.testing.assert_close(pairs["A_6x9"].grad, A.grad)


def test_at_the_start_only_the_weights_of_ranks_have_a_gradient() -> None:
    model = net()
    adapter, deltas = attached(model)
    model(torch.randn(5, 9)).square().sum().backward()
    assert all(not p.grad.any() for p in adapter.shared.parameters())
    assert all(delta.s.grad.abs().sum() > 0 for delta in deltas)


def test_the_proximal_step_makes_exact_zeros() -> None:
    model = net()
    adapter, deltas = attached(model, sparsity=0.5, orthogonality=0.0)
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=0.1), 5)
    values = torch.tensor([0.2, -0.04, -0.5])
    with torch.no_grad():
        deltas[0].s.copy_(values)
    model(torch.zeros(1, 9)).sum().mul(0).backward()  # no gradient: what moves is the proximal step
    optimizer.step()
    torch.testing.assert_close(deltas[0].s.detach(), torch.tensor([0.15, 0.0, -0.45]))
    assert deltas[0].s[1] == 0
    B, A = deltas[0].factors()
    assert len(A) == 2
    torch.testing.assert_close(B @ A, deltas[0].weight()[0] - model[0].weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_orthogonality_term(weight: float) -> None:
    model = net().double()
    adapter, _ = attached(model, orthogonality=weight, sparsity=0.0)
    optimizer = adapter.bind(torch.optim.SGD(adapter.parameters(), lr=1.0), 5)
    before = {name: p.detach().clone() for name, p in adapter.shared.named_parameters()}
    model(torch.zeros(1, 9, dtype=torch.float64)).sum().mul(0).backward()
    optimizer.step()
    for name, p in adapter.shared.named_parameters():
        X = before[name] if name.startswith("A") else before[name].T
        gradient = 4 * weight * (X @ X.T - torch.eye(3, dtype=torch.float64)) @ X  # of the squared norm, by hand
        torch.testing.assert_close(p.detach(), before[name] - (gradient if name.startswith("A") else gradient.T))
