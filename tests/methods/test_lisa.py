"""What only LISA promises: which blocks train, for how long, and what the optimizer remembers of the others."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import graft
from graft.methods.allocation.lisa import BlockSampler
from tests import tiny

LAYERS = 5


def lisa(model: nn.Module | None = None, lr: float = 1e-2, **options: object) -> tuple[graft.Adapter, BlockSampler, torch.optim.Optimizer]:
    adapter = graft.attach(model or tiny.llama(layers=LAYERS), "lisa", **{"active_blocks": 2, "interval": 3, **options})
    optimizer = adapter.optimizer(lr=lr, total_steps=100, weight_decay=0.1)
    (sampler,) = adapter.callbacks
    assert isinstance(sampler, BlockSampler)
    return adapter, sampler, optimizer


def by_block(adapter: graft.Adapter) -> dict[int | None, list[nn.Parameter]]:
    """Parameters by depth; None: embedding, head and final norm."""
    found: dict[int | None, list[nn.Parameter]] = {}
    for delta in adapter.deltas.values():
        found.setdefault(delta.target.depth, []).extend(delta.parameters())
    return found


def active(adapter: graft.Adapter) -> set[int]:
    return {depth for depth, ps in by_block(adapter).items() if depth is not None and all(p.requires_grad for p in ps)}


def step(adapter: graft.Adapter, optimizer: torch.optim.Optimizer, batches: int = 1) -> None:
    adapter.model.train()
    for batch in tiny.causal_batches(batches):
        adapter.model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_exactly_gamma_blocks_train_and_the_others_keep_their_bits() -> None:
    """Over four draws of three updates; weight decay and old momentum touch no frozen block; embedding, head and norm move every time."""
    adapter, _, optimizer = lisa()
    drawn = []
    for update in range(12):
        if update % 3 == 0:
            chosen = active(adapter)
            drawn.append(chosen)
        assert active(adapter) == chosen
        assert len(chosen) == 2
        before = {depth: [p.detach().clone() for p in ps] for depth, ps in by_block(adapter).items()}
        step(adapter, optimizer)
        for depth, ps in by_block(adapter).items():
            same = [torch.equal(p, old) for p, old in zip(ps, before[depth], strict=True)]
            assert not any(same) if depth is None or depth in chosen else all(same), (update, depth)
    assert len({tuple(sorted(c)) for c in drawn}) > 1
    assert by_block(adapter).keys() == {None, *range(LAYERS)}
    assert len(by_block(adapter)[None]) == 3


def test_half_a_block_is_never_active() -> None:
    adapter, _, optimizer = lisa()
    for _ in range(9):
        for ps in by_block(adapter).values():
            assert len({p.requires_grad for p in ps}) == 1
        step(adapter, optimizer)


def test_micro_batches_do_not_switch() -> None:
    """Four backward passes an update, interval 3: one draw in three updates."""
    adapter, sampler, optimizer = lisa()
    draws = []
    original = sampler._draw
    sampler._draw = lambda draw: draws.append(draw) or original(draw)  # type: ignore[method-assign]
    for _ in range(6):
        step(adapter, optimizer, batches=4)
    assert draws == [1, 2]


def full(steps: int) -> list[Tensor]:
    """Full fine-tuning of every weight, by torch on the model itself."""
    model = tiny.llama(layers=LAYERS)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)
    tiny.train(model, optimizer, tiny.causal_batches(1), steps)
    return [p.detach() for _, p in sorted(model.named_parameters())]


@pytest.mark.parametrize("keep_state", ["keep", "drop"])
def test_all_blocks_are_full_fine_tuning(keep_state: str) -> None:
    """gamma = L freezes nothing, so nothing is dropped either: torch's trajectory through three draws."""
    adapter, _, optimizer = lisa(active_blocks=LAYERS, keep_state=keep_state)
    for _ in range(7):
        step(adapter, optimizer)
    named = {f"{name}.{key.removeprefix('copy.')}": p for name, d in adapter.deltas.items() for key, p in d.named_parameters()}
    for (_, seen), wanted in zip(sorted(named.items()), full(7), strict=True):
        torch.testing.assert_close(seen.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_no_blocks_train_embedding_head_and_final_norm_only() -> None:
    adapter, _, optimizer = lisa(active_blocks=0)
    assert active(adapter) == set()
    before = {depth: [p.detach().clone() for p in ps] for depth, ps in by_block(adapter).items()}
    for _ in range(4):
        step(adapter, optimizer)
    changed = {depth for depth, ps in by_block(adapter).items() for p, old in zip(ps, before[depth], strict=True) if not torch.equal(p, old)}
    assert changed == {None}


def held(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.numel() for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim)


def test_dropped_state_stays_small_and_kept_state_grows() -> None:
    """drop: never more than two moments of gamma blocks and what always trains; keep: in the end all blocks'."""
    sizes = {}
    for keep_state in ("drop", "keep"):
        adapter, _, optimizer = lisa(keep_state=keep_state, interval=1)
        sizes[keep_state] = []
        for _ in range(14):
            step(adapter, optimizer)
            sizes[keep_state].append(held(optimizer))
    blocks = by_block(adapter)
    always, block = (sum(p.numel() for p in blocks[depth]) for depth in (None, 0))
    assert max(sizes["drop"]) <= 2 * (always + 2 * block)
    assert max(sizes["keep"]) == 2 * (always + LAYERS * block)
    assert sizes["keep"] == sorted(sizes["keep"])


def test_a_block_that_returns_starts_afresh_or_goes_on() -> None:
    """drop: its step count is that of its own interval; keep: of all its updates. The learning-rate schedule is global in both."""
    for keep_state in ("drop", "keep"):
        adapter, _, optimizer = lisa(keep_state=keep_state, interval=2, active_blocks=1)
        seen: Counter[int] = Counter()
        for update in range(20):
            (chosen,) = active(adapter)
            step(adapter, optimizer)
            seen[chosen] += 1
            if update % 2 == 0:  # after the last update of an interval the block may be frozen, and its state gone
                counts = {int(optimizer.state[p]["step"]) for p in by_block(adapter)[chosen]}
                assert len(counts) == 1
                assert counts == {seen[chosen]} if keep_state == "keep" else counts <= {1, seen[chosen]}
        assert {int(optimizer.state[p]["step"]) for p in by_block(adapter)[None]} == {20}
        assert max(seen.values()) > 2


def test_draws_are_uniform_and_a_function_of_seed_and_number() -> None:
    """Chi-square of 1000 draws of 2 of 5 blocks, single and in pairs; equal on every rank because nothing else enters."""
    _, sampler, _ = lisa()
    draws = [tuple(sampler.drawn(number)) for number in range(1000)]
    torch.manual_seed(99)
    _, twin, _ = lisa()
    assert draws == [tuple(twin.drawn(number)) for number in range(1000)]
    assert all(len(set(d)) == 2 for d in draws)
    singles, pairs = Counter(depth for d in draws for depth in d), Counter(draws)
    assert sum((n - 400) ** 2 / 400 for n in singles.values()) < 18.5  # 4 degrees of freedom, 0.999 quantile
    assert len(pairs) == 10
    assert sum((n - 100) ** 2 / 100 for n in pairs.values()) < 27.9  # 9 degrees of freedom
    _, other, _ = lisa(tiny.llama(layers=LAYERS), seed=1)
    assert draws[:20] != [tuple(other.drawn(number)) for number in range(20)]


def test_frozen_weights_get_no_gradient_and_stale_ones_are_gone() -> None:
    """Without zero_grad between two updates a block frozen in between would otherwise be stepped with its last gradient."""
    adapter, _, optimizer = lisa(interval=1, keep_state="keep")
    for _ in range(6):
        adapter.model.train()
        adapter.model(**tiny.causal_batches(1)[0]).loss.backward()
        assert all(p.grad is None for depth, ps in by_block(adapter).items() if depth is not None and depth not in active(adapter) for p in ps)
        optimizer.step()
        assert all(p.grad is None for depth, ps in by_block(adapter).items() if depth is not None and depth not in active(adapter) for p in ps)


def test_gradient_checkpointing_keeps_the_gradients() -> None:
    """The graph must reach down to the embedding, which always trains."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny.llama(layers=LAYERS)
        adapter, _, _ = lisa(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**tiny.causal_batches(1)[0], use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, d in adapter.deltas.items() for p in d.parameters()})
    assert gradients[0]["model.embed_tokens"].any()
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain)


def test_an_optimizer_without_the_frozen_blocks_is_refused() -> None:
    """Those blocks would be drawn later and never train: the same loss whatever LISA does."""
    adapter, _, _ = lisa()
    trained_now = [p for ps in by_block(adapter).values() for p in ps if p.requires_grad]
    with pytest.raises(graft.GraftError, match="not in the optimizer"):
        adapter.bind(torch.optim.AdamW(trained_now), 10)


def test_more_blocks_than_there_are_is_refused() -> None:
    adapter = graft.attach(tiny.llama(), "lisa", active_blocks=3)
    with pytest.raises(graft.GraftError, match="2 blocks"):
        adapter.optimizer(lr=1e-3, total_steps=1)
