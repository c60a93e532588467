"""Surgery on optimizer state, against what torch's optimizers keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graft.core import optimizer_state

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def trained(kind: str = "adamw", shape: tuple[int, ...] = (4, 3), steps: int = 3) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameter, other = (nn.Parameter(torch.randn(s, generator=generator)) for s in (shape, (2, 2)))
    optimizer = OPTIMIZERS[kind]([parameter, other])
    for _ in range(steps):
        for p in (parameter, other):
            p.grad = torch.randn(p.shape, generator=generator) + 1
        optimizer.step()
    return parameter, other, optimizer


def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in optimizer.state[parameter].items() if isinstance(v, torch.Tensor) and k != "step"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dim", [0, 1])
def test_reset_at_an_index(kind: str, dim: int) -> None:
    """Exactly the given rows or columns become zero; the others, the step count and other parameters keep theirs."""
    parameter, other, optimizer = trained(kind)
    before, others = moments(optimizer, parameter), moments(optimizer, other)
    step = optimizer.state[parameter].get("step", torch.tensor(0.0)) + 0
    optimizer_state.reset(optimizer, parameter, torch.tensor([0, 2]), dim)
    assert before
    for name, moment in moments(optimizer, parameter).items():
        wanted = before[name].clone()
        wanted[(slice(None), [0, 2]) if dim else [0, 2]] = 0
        assert torch.equal(moment, wanted)
        assert (before[name] != 0).all()
    for name, moment in moments(optimizer, other).items():
        assert torch.equal(moment, others[name])
    assert optimizer.state[parameter].get("step", torch.tensor(0.0)) == step


def test_reset_of_all() -> None:
    parameter, _, optimizer = trained()
    optimizer_state.reset(optimizer, parameter)
    assert all(not m.any() for m in moments(optimizer, parameter).values())
    assert optimizer.state[parameter]["step"] == 3


def test_a_scalar_parameter_keeps_its_step_count() -> None:
    """Its moments have the shape of the step count; only they are reset."""
    parameter, _, optimizer = trained(shape=())
    optimizer_state.reset(optimizer, parameter)
    assert optimizer.state[parameter]["step"] == 3
    assert all(not m.any() for m in moments(optimizer, parameter).values())


def test_reset_before_the_first_step_is_nothing() -> None:
    parameter, _, optimizer = trained(steps=0)
    optimizer_state.reset(optimizer, parameter)
    assert not optimizer.state.get(parameter)


@pytest.mark.parametrize("dim", [0, 1])
def test_permuting_parameter_and_state_commutes_with_a_step(dim: int) -> None:
    """Permute, then step with the permuted gradient = step, then permute."""
    order = torch.tensor([2, 0, 1]) if dim else torch.tensor([3, 0, 2, 1])
    gradient = torch.arange(12.0).view(4, 3).cos()
    results = []
    for permute_first in (True, False):
        parameter, _, optimizer = trained()

        def permute(parameter: nn.Parameter = parameter, optimizer: torch.optim.Optimizer = optimizer) -> None:
            parameter.data = parameter.data.index_select(dim, order)
            optimizer_state.permute(optimizer, parameter, order, dim)

        if permute_first:
            permute()
        parameter.grad = gradient.index_select(dim, order) if permute_first else gradient.clone()
        optimizer.step()
        if not permute_first:
            permute()
        results.append((parameter.detach(), moments(optimizer, parameter)))
    assert torch.equal(results[0][0], results[1][0])
    for name, moment in results[0][1].items():
        assert torch.equal(moment, results[1][1][name])


def test_drop_starts_afresh() -> None:
    """After a drop the next step is the first step of a new optimizer, and a second drop is nothing."""
    parameter, _, optimizer = trained()
    optimizer_state.drop(optimizer, parameter)
    optimizer_state.drop(optimizer, parameter)
    assert parameter not in optimizer.state
    twin = nn.Parameter(parameter.detach().clone())
    parameter.grad = torch.ones(4, 3)
    twin.grad = torch.ones(4, 3)
    fresh = torch.optim.AdamW([twin], lr=0.1)
    optimizer.step()
    fresh.step()
    assert torch.equal(parameter, twin)


@pytest.mark.parametrize("dim", [0, 1])
def test_replace_keeps_the_moments_of_what_is_kept(dim: int) -> None:
    """A shrunk parameter goes on exactly as its part of the old one would have; AdamW acts on each entry alone."""
    index = torch.tensor([2, 0])
    old, other, optimizer = trained()
    whole, _, reference = trained()
    new = nn.Parameter(old.detach().index_select(dim, index))
    optimizer_state.replace(optimizer, old, new, index, dim)
    assert [p is new or p is other for group in optimizer.param_groups for p in group["params"]] == [True, True]
    assert old not in optimizer.state
    gradient = torch.arange(12.0).view(4, 3).cos()
    new.grad, whole.grad = gradient.index_select(dim, index), gradient
    optimizer.step()
    reference.step()
    assert torch.equal(new.detach(), whole.detach().index_select(dim, index))


def test_replace_before_the_first_step() -> None:
    old, _, optimizer = trained(steps=0)
    new = nn.Parameter(old.detach()[:2])
    optimizer_state.replace(optimizer, old, new, torch.tensor([0, 1]))
    assert new not in optimizer.state
    assert any(p is new for group in optimizer.param_groups for p in group["params"])
