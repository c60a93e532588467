"""What only TriAdaptLoRA promises: the triangular core, growth that changes nothing at that moment, the law of growth and the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.tri_adapt_lora import Growth, TriAdaptLoRADelta
from tests.methods.small import Net, layer, randomise


def tri(model: nn.Module, steps: int = 20, lr: float = 0.01, **options: object) -> tuple[graft.Adapter, TriAdaptLoRADelta, torch.optim.Optimizer]:
    adapter = graft.attach(model, "tri-adapt-lora", targets="all", **{"rank": 4, "block": 2, "orthogonality": 0.0, **options})
    delta = next(iter(adapter.deltas.values()))
    assert isinstance(delta, TriAdaptLoRADelta)
    return adapter, delta, adapter.optimizer(lr=lr, total_steps=steps)


def growth_of(adapter: graft.Adapter) -> Growth:
    (callback,) = adapter.callbacks
    assert isinstance(callback, Growth)
    return callback


def by_strips(delta: TriAdaptLoRADelta, blocks: int) -> Tensor:
    """The paper's core: each block adds a row strip [d, rho_i] on the left and a column strip [rho_i, d] at the top, zero padded."""
    rank = len(delta.A)
    C = torch.zeros(rank, rank, dtype=delta.A.dtype)
    lower, upper, end, used = delta.lower.detach(), delta.upper.detach(), 0, 0
    for size in delta.sizes[:blocks]:
        start, end = end, end + size
        strip = slice(used, used := used + size * end)
        C[start:end, :end] += lower[strip].view(size, end)
        C[:end, start:end] += upper[strip].view(size, end).T
    return C


@settings(max_examples=20, deadline=None)
@given(initial=st.integers(1, 3), block=st.integers(1, 3), data=st.data())
def test_the_core_is_low_plus_up_at_every_stage_of_growth(initial: int, block: int, data: st.DataObject) -> None:
    model = layer(8, 9).double()
    _, delta, _ = tri(model, initial_rank=initial, block=block, alpha=6.0)
    randomise(delta)
    assert sum(delta.sizes) <= 8 < sum(delta.sizes) + block  # the largest structure that fits
    x = torch.randn(3, 9, dtype=torch.float64)
    for blocks in range(1, len(delta.sizes) + 1):
        assert delta.blocks == blocks
        C = by_strips(delta, blocks)
        torch.testing.assert_close(delta.core().detach(), C)
        rank = sum(delta.sizes[:blocks])
        assert not C[rank:].any()
        W = model[0].weight + 1.5 * delta.B[:, :rank] @ C[:rank, :rank] @ delta.A[:rank]
        torch.testing.assert_close(delta.weight()[0], W)
        torch.testing.assert_close(model(x), x @ W.T + model[0].bias)
        if blocks < len(delta.sizes):
            delta.grow()
    count = sum(2 * size * sum(delta.sizes[: i + 1]) for i, size in enumerate(delta.sizes))
    assert count == delta.lower.numel() + delta.upper.numel()


def test_the_count_of_blocks_of_one() -> None:
    """rho (rho + 1) numbers in the strips."""
    assert graft.methods()["tri-adapt-lora"].cost(100, 60, rank=5, block=1) == 10 * 160 + 10 * 11


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, width: int = 9) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()


def test_growing_changes_no_output_and_no_moment_and_the_new_strips_learn() -> None:
    model = layer()
    _, delta, optimizer = tri(model, interval=100)
    train(model, optimizer, range(6))
    x = torch.randn(4, 9)
    before, weight = model(x), delta.weight()[0]
    moments = {p: {name: value.clone() for name, value in optimizer.state[p].items()} for p in delta.parameters()}
    assert weight.sub(model[0].weight).norm() > 1e-3
    groups = [dict(group) for group in optimizer.param_groups]
    delta.grow()
    assert torch.equal(model(x), before)
    assert torch.equal(delta.weight()[0], weight)
    assert all(torch.equal(value, optimizer.state[p][name]) for p, held in moments.items() for name, value in held.items())
    assert [{**group, "params": None} for group in optimizer.param_groups] == [{**group, "params": None} for group in groups]
    new = torch.tensor([False, True, True, True, True, True, True])  # one entry of the first block, 2 x 3 of the second
    model.zero_grad()
    model(x).square().sum().backward()
    for gradient in (delta.lower.grad, delta.upper.grad):
        assert torch.equal(gradient[:7] != 0, torch.ones_like(new))
        assert not gradient[7:].any()
    optimizer.step()
    assert all(p.detach()[:7][new].abs().min() > 0 for p in (delta.lower, delta.upper))


def test_it_starts_as_the_base_with_a_core_that_learns_at_once() -> None:
    """Unlike the authors' start, at which B and C are zero and no gradient ever is anything else."""
    model = layer(40, 300).double()
    _, delta, _ = tri(model, initial_rank=2, rank=20, largest_rank=40)
    assert torch.equal(delta.weight()[0], model[0].weight)
    for factor in (delta.A, delta.B):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.1)
    model(torch.randn(5, 300, dtype=torch.float64)).square().sum().backward()
    assert delta.lower.grad[:4].abs().min() > 0
    assert delta.upper.grad[:4].abs().min() > 0
    assert not delta.A.grad.any()
    assert not delta.B.grad.any()


def test_with_the_identity_as_core_it_is_lora() -> None:
    model, twin = layer(), layer()
    _, delta, _ = tri(model, initial_rank=4, alpha=6.0)
    randomise(delta)
    (lora,) = graft.attach(twin, "lora", rank=4, alpha=6.0).deltas.values()
    with torch.no_grad():
        delta.upper.zero_()
        delta.lower.zero_()
        delta.lower[:16] = torch.eye(4).flatten()
        lora.A.copy_(delta.A[:4])
        lora.B.copy_(delta.B[:, :4])
    torch.testing.assert_close(delta.weight()[0], lora.weight()[0])


@pytest.mark.parametrize(("law", "expected"), [("linear", [1, 15, 30]), ("non-linear", [1, 5, 30])])
def test_how_many_grow(law: str, expected: list[int]) -> None:
    """Of 30 ranks left, at q = 0, 1/2 and 1: int(30 q), or int(30^q); the warm-up is not counted in q."""
    adapter, _, _ = tri(layer(), 120, growth=law, warmup=1 / 6)
    assert [growth_of(adapter).wanted(30, t) for t in (20, 70, 120)] == expected
    assert growth_of(adapter).wanted(1, 70) == 1


def network(count: int = 4) -> Net:
    torch.manual_seed(0)
    return Net(*(nn.Linear(12, 12) for _ in range(count)))


def set_cores(adapter: graft.Adapter, values: list[float]) -> None:
    """The first entry of each core, which is then its norm."""
    with torch.no_grad():
        for delta, value in zip(adapter.deltas.values(), values, strict=True):
            delta.lower[0] = value


def ranks(adapter: graft.Adapter) -> list[int]:
    return [int(delta.active.sum()) for delta in adapter.deltas.values()]


def check(adapter: graft.Adapter, t: int) -> list[int]:
    """What the targets' ranks are after ``t`` finished updates."""
    growth_of(adapter).after_update(t - 1)
    return ranks(adapter)


def test_the_targets_whose_core_changed_most_grow_step_by_step() -> None:
    """R = 16, R_now = 4 at first. t = 10: q = 0.1, K = max(1, 1.2) = 1; t = 20: K = int(10 * 0.2) = 2; t = 60: K = int(6 * 0.6) = 3."""
    adapter, _, _ = tri(network(), 100, warmup=0.0)
    set_cores(adapter, [1.0, 3.0, 2.0, 2.5])
    assert check(adapter, 9) == [1, 1, 1, 1]  # between two checks
    assert check(adapter, 10) == [1, 3, 1, 1]
    set_cores(adapter, [1.5, 4.0, 2.1, 2.8])  # I = 1.5 - 1, 4 / 2 - 3, 2.1 - 2, 2.8 - 2.5: the largest core changed least
    assert check(adapter, 20) == [3, 3, 1, 3]
    set_cores(adapter, [4.0, 8.0, 2.2, 7.0])  # I = 2 - 1.5, 4 - 2, 2.2 - 2.1, 3.5 - 2.8
    assert check(adapter, 60) == [5, 5, 1, 5]
    assert growth_of(adapter).last == pytest.approx({"maps.0": 2.0, "maps.1": 4.0, "maps.2": 2.2, "maps.3": 3.5})
    set_cores(adapter, [0.0, 0.0, 9.0, 0.0])
    assert check(adapter, 70) == [5, 5, 1, 5]  # the budget is spent


def test_equal_targets_grow_in_the_model_s_order() -> None:
    adapter, _, _ = tri(network(), 100, warmup=0.0)
    assert check(adapter, 10) == [3, 1, 1, 1]
    assert check(adapter, 20) == [5, 3, 1, 1]


def test_blocks_that_no_longer_fit_the_budget_are_left_out() -> None:
    """R = 8, R_now = 4, K = 4 at q = 1, blocks of 3: one target can grow."""
    adapter, _, _ = tri(network(), 100, rank=2, block=3, warmup=0.0)
    set_cores(adapter, [1.0, 3.0, 2.0, 2.5])
    assert check(adapter, 100) == [1, 4, 1, 1]


def test_nothing_grows_before_the_end_of_the_warm_up() -> None:
    adapter, _, _ = tri(network(), 100, warmup=0.3)
    for t in range(1, 31):
        assert check(adapter, t) == [1, 1, 1, 1]
    assert check(adapter, 40) == [3, 1, 1, 1]


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(1, 6), block=st.integers(1, 4), law=st.sampled_from(["linear", "non-linear"]), seed=st.integers(0, 99))
def test_the_budget_and_the_largest_rank_are_never_exceeded(rank: int, block: int, law: str, seed: int) -> None:
    adapter, _, _ = tri(network(3), 50, rank=rank, block=block, growth=law, interval=2, largest_rank=rank + 2, warmup=0.0)
    generator = torch.Generator().manual_seed(seed)
    for t in range(1, 51):
        set_cores(adapter, torch.rand(3, generator=generator).tolist())
        found = check(adapter, t)
        assert sum(found) <= 3 * rank
        assert max(found) <= rank + 2
    full = [1 + block * ((rank + 2 - 1) // block)] * 3
    assert 3 * rank - sum(found) < block or found == full  # and it is used up, as far as blocks go


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_penalty_is_of_the_active_ranks(weight: float) -> None:
    adapter, delta, _ = tri(network(2), orthogonality=weight, initial_rank=2)
    delta.grow()
    penalty = growth_of(adapter).penalty()
    if not weight:
        assert penalty is None
        return
    wanted = 0.0
    for each, rank in zip(adapter.deltas.values(), (4, 2), strict=True):
        A, B = each.A.detach()[:rank], each.B.detach()[:, :rank]
        wanted += float((A @ A.T - torch.eye(rank)).norm() + (B.T @ B - torch.eye(rank)).norm()) / 2
    assert float(penalty.detach()) == pytest.approx(0.5 * wanted)
    penalty.backward()
    assert delta.A.grad[:4].abs().min() > 0
    assert not delta.A.grad[4:].any()


def test_a_run_grows_and_its_resumption_grows_alike(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, graft.Adapter, torch.optim.Optimizer]:
        model = network()
        adapter, _, optimizer = tri(model, 16, interval=3, warmup=0.0, orthogonality=0.1)
        return model, adapter, optimizer

    model, whole, optimizer = begin()
    train(model, optimizer, range(16), 12)
    assert len(set(ranks(whole))) > 1
    model, killed, optimizer = begin()
    train(model, optimizer, range(7), 12)
    states = killed.state_dict(), optimizer.state_dict()
    assert ranks(killed) != ranks(whole)
    model, resumed, optimizer = begin()
    resumed.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    assert growth_of(resumed).last == growth_of(killed).last != {}
    train(model, optimizer, range(7, 16), 12)
    assert ranks(resumed) == ranks(whole)
    assert all(torch.equal(value, whole.tensors()[name]) for name, value in resumed.tensors().items())
    loaded = graft.load_adapter(network(), whole.save(tmp_path))
    assert ranks(loaded) == ranks(whole)


def test_ranks_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(graft.GraftError, match=r"initial_rank is 5.*rank = 4"):
        tri(layer(), initial_rank=5)
    with pytest.raises(graft.GraftError, match=r"largest_rank is 3.*rank = 4"):
        tri(layer(), largest_rank=3)
