"""What only DyLoRA promises: nested ranks, one draw an update, and files that are LoRAs of the chosen rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.dylora import DyLoRADelta, RankSampler, set_rank
from tests import tiny
from tests.methods.small import layer, quiet_peft, randomise


def dylora(model: nn.Module, **options: object) -> tuple[graft.Adapter, DyLoRADelta]:
    adapter = graft.attach(model, "dylora", **{"rank": 4, **options})
    delta = next(iter(adapter.deltas.values()))
    assert isinstance(delta, DyLoRADelta)
    return adapter, delta


def update_of(delta: DyLoRADelta) -> Tensor:
    return (delta.weight()[0] - delta.target.weight()).detach()


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), alpha=st.floats(0.5, 9), data=st.data())
def test_every_rank_is_the_closed_form(out: int, width: int, rank: int, alpha: float, data: st.DataObject) -> None:
    """dW_b = alpha / b sum_{j < b} B_j A_j, summed one by one; b dW_b / alpha grows by one rank at a time."""
    rank = min(rank, out, width)
    model = layer(out, width).double()
    adapter, delta = dylora(model, rank=rank, alpha=alpha)
    randomise(delta)
    x = torch.randn(3, width, dtype=torch.float64)
    chosen = data.draw(st.integers(1, rank))
    set_rank(adapter, chosen)
    wanted = sum(torch.outer(delta.B[:, j], delta.A[j]) for j in range(chosen)).detach() * (alpha / chosen)
    torch.testing.assert_close(update_of(delta), wanted)
    torch.testing.assert_close(model(x), x @ (model[0].weight + wanted).T + model[0].bias)


def test_it_starts_as_the_base_at_every_rank_also_with_a_start_that_is_subtracted(tmp_path: Path) -> None:
    model = layer()
    adapter, delta = dylora(model)
    for rank in (1, 2, 3, 4, None):
        set_rank(adapter, rank)
        assert not update_of(delta).any()
    randomise(delta)
    delta.freeze_start()
    A0, B0 = delta.A.detach().clone(), delta.B.detach().clone()
    randomise(delta, seed=2)
    for rank in (1, 3):
        set_rank(adapter, rank)
        wanted = (8 / rank) * (delta.B[:, :rank] @ delta.A[:rank] - B0[:, :rank] @ A0[:rank])
        torch.testing.assert_close(update_of(delta), wanted.detach(), atol=1e-5, rtol=1e-5)
        (loaded,) = graft.load_adapter(layer(), adapter.save(tmp_path / str(rank))).deltas.values()
        torch.testing.assert_close(update_of(loaded), wanted.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rank", "lowest"), [(1, 1), (4, 4)])
def test_where_only_the_full_rank_is_drawn_it_is_lora(rank: int, lowest: int) -> None:
    ends = []
    for method, options in (("dylora", {"lowest": lowest}), ("lora", {})):
        model = tiny.llama()
        adapter = graft.attach(model, method, rank=rank, alpha=6.0, **options)
        tiny.train(model, adapter.optimizer(lr=0.01, total_steps=4, weight_decay=0.1), tiny.causal_batches(), 4)
        ends.append([p.detach() for p in adapter.parameters()])
        assert any(delta.B.any() for delta in adapter.deltas.values())
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize("update", ["all", "last"])
def test_gradients_reach_the_drawn_ranks_only(update: str) -> None:
    model = layer().double()
    adapter, delta = dylora(model, update=update)
    randomise(delta)
    adapter.optimizer(lr=0.1, total_steps=9)
    (sampler,) = adapter.callbacks
    assert isinstance(sampler, RankSampler)
    seen = set()
    for step in range(9):
        adapter.step = step
        b = sampler.drawn(step)
        seen.add(b)
        A, B = (p.detach().clone().requires_grad_(True) for p in (delta.A, delta.B))
        x = torch.randn(5, 9, dtype=torch.float64)
        y = x @ (model[0].weight + 8 / b * B[:, :b] @ A[:b]).T + model[0].bias
        wanted = torch.autograd.grad(y.square().sum(), (A, B))
        live = torch.zeros(4, dtype=torch.float64)
        live[(b - 1 if update == "last" else 0) : b] = 1
        model.zero_grad()
        model.train()
        model(x).square().sum().backward()
        torch.testing.assert_close(delta.A.grad, wanted[0] * live[:, None])
        torch.testing.assert_close(delta.B.grad, wanted[1] * live)
        for gradient in (delta.A.grad.abs().sum(1), delta.B.grad.abs().sum(0)):
            assert torch.equal(gradient > 0, live > 0)
    assert len(seen) > 2


def test_one_rank_an_update_at_all_targets_from_the_seed_and_its_number_alone() -> None:
    """Micro-batches do not draw again; a process with another generator, or that begins in the middle, draws the same."""

    def ranks(start: int, torch_seed: int, seed: int = 5) -> list[int]:
        torch.manual_seed(torch_seed)
        model = tiny.llama()
        adapter, _ = dylora(model, rank=8, seed=seed)
        optimizer = adapter.optimizer(lr=0.01, total_steps=12)
        adapter.step = start
        model.train()
        found = []
        for _ in range(start, 12):
            drawn = set()
            for batch in tiny.causal_batches(2):
                model(**batch).loss.backward()
                drawn |= {delta.sampled for delta in adapter.deltas.values()}
            optimizer.step()
            optimizer.zero_grad()
            assert len(drawn) == 1
            found += drawn
        return found

    whole = ranks(0, 0)
    assert len(set(whole)) > 3
    assert ranks(5, 1) == whole[5:]
    assert ranks(0, 0, seed=6) != whole


def test_draws_are_uniform_from_the_lowest_to_the_largest_rank() -> None:
    adapter, _ = dylora(layer(), rank=5, lowest=2)
    adapter.optimizer(lr=0.1, total_steps=1)
    (sampler,) = adapter.callbacks
    assert isinstance(sampler, RankSampler)
    counts = Counter(sampler.drawn(step) for step in range(2000))
    assert counts.keys() == {2, 3, 4, 5}
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in counts.values())  # five standard deviations


def test_momentum_moves_ranks_that_are_not_drawn() -> None:
    """As in the authors' code: their gradient is zero, not absent."""
    model = layer()
    adapter, delta = dylora(model)
    optimizer = adapter.optimizer(lr=0.1, total_steps=20)
    (sampler,) = adapter.callbacks
    assert isinstance(sampler, RankSampler)
    adapter.step = next(step for step in range(20) if sampler.drawn(step) == 4)
    model.train()
    model(torch.randn(3, 9)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    adapter.step = next(step for step in range(20) if sampler.drawn(step) == 1)
    before = delta.B.detach().clone()
    model(torch.randn(3, 9)).square().sum().backward()
    assert not delta.B.grad[:, 1:].any()
    optimizer.step()
    assert torch.all(before != delta.B)


def test_evaluation_merges_and_factors_use_the_chosen_rank_whatever_training_draws() -> None:
    model = layer()
    _, delta = dylora(model, use_rank=2)
    randomise(delta)
    x = torch.randn(3, 9)
    wanted = (8 / 2) * (delta.B[:, :2] @ delta.A[:2]).detach()
    delta.sampled = 1
    for training in (True, False):
        model.train(training)
        torch.testing.assert_close(update_of(delta), wanted)
        B, A = delta.factors()
        assert A.shape == (2, 9)
        torch.testing.assert_close(B @ A, wanted)
    torch.testing.assert_close(model(x), x @ (model[0].weight + wanted).T + model[0].bias)
    model.train()
    drawn = 8 * (delta.B[:, :1] @ delta.A[:1])
    torch.testing.assert_close(model[0](x), x @ (model[0].weight + drawn).T + model[0].bias)


@quiet_peft
@pytest.mark.parametrize("targets", ["linear", ("embed_tokens", "q_proj")])
def test_a_file_is_a_lora_of_the_chosen_rank(tmp_path: Path, targets: str | tuple[str, ...]) -> None:
    import peft

    model = tiny.llama()
    adapter, _ = dylora(model, targets=targets)
    for seed, delta in enumerate(adapter.deltas.values()):
        randomise(delta, seed, 0.3)
    batch = tiny.causal_batches(1)[0]
    logits = {}
    for rank in (1, 3, 4):
        set_rank(adapter, rank)
        adapter.save(tmp_path / str(rank))
        logits[rank] = model(**batch).logits
        plain = tiny.llama()
        loaded = graft.load_adapter(plain, tmp_path / str(rank))
        assert {d.rank for d in loaded.deltas.values()} == {rank}
        torch.testing.assert_close(plain(**batch).logits, logits[rank], atol=1e-5, rtol=1e-5)
        theirs = peft.PeftModel.from_pretrained(tiny.llama(), str(tmp_path / str(rank))).eval()
        torch.testing.assert_close(theirs(**batch).logits, logits[rank], atol=1e-5, rtol=1e-5)
    assert (logits[1] - logits[4]).norm() > 0.01 * logits[4].norm()
    loaded = graft.load_adapter(plain := tiny.llama(), tmp_path / "4")  # the whole one can still be cut
    set_rank(loaded, 1)
    torch.testing.assert_close(plain(**batch).logits, logits[1], atol=1e-5, rtol=1e-5)


def test_ranks_that_are_not_there_are_refused() -> None:
    with pytest.raises(graft.GraftError, match=r"use_rank is 5.*rank = 4"):
        dylora(layer(), use_rank=5)
    with pytest.raises(graft.GraftError, match=r"lowest is 6.*rank = 4"):
        dylora(layer(), lowest=6)
    adapter, _ = dylora(layer())
    with pytest.raises(graft.GraftError, match="choose 1 to 4"):
        set_rank(adapter, 5)
