"""What only SHiRA promises: the masks, high rank from few entries, and switches that touch those entries only."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.core.slot import slot_of
from graft.methods.deltas.shira import SHiRADelta, structured
from tests import tiny
from tests.methods.small import Net, layer, randomise

MASKS = ["random", "weight", "gradient", "snip", "struct"]


def attached(model: nn.Module, **options: object) -> dict[str, SHiRADelta]:
    """By target name."""
    return dict(graft.attach(model, "shira", calibration=tiny.causal_batches(2), **options).deltas)  # type: ignore[arg-type]


def dense_gradients(model: nn.Module) -> dict[str, Tensor]:
    twin = copy.deepcopy(model).requires_grad_(True)
    for batch in tiny.causal_batches(2):
        (twin(**batch).loss / 2).backward()
    return {name: p.grad for name, p in twin.named_parameters()}


# ---- masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_has_exactly_k_distinct_positions(mask: str) -> None:
    """As many as a LoRA of the rank has parameters; ascending; the same for the same seed."""
    first, again = (attached(tiny.llama(), rank=2, mask=mask) for _ in range(2))
    for name, delta in first.items():
        out, width = delta.target.shape
        assert len(delta.indices) == len(delta.values) == 2 * (out + width)
        assert (delta.indices.diff() > 0).all()
        assert delta.indices.min() >= 0
        assert delta.indices.max() < out * width
        assert torch.equal(delta.indices, again[name].indices)
        assert not delta.indices.is_floating_point()


@pytest.mark.parametrize("mask", ["weight", "gradient", "snip"])
def test_scored_masks_are_the_largest_scores(mask: str) -> None:
    """|W|, |G| and |W G|, with G from autograd on a dense trainable copy; no position left out scores higher than one taken."""
    model = tiny.llama()
    gradients = dense_gradients(model)
    for name, delta in attached(model, rank=2, mask=mask).items():
        W, G = delta.target.weight(), gradients[f"{name}.weight"]
        score = {"weight": W.abs(), "gradient": G.abs(), "snip": (W * G).abs()}[mask].reshape(-1)
        taken = torch.zeros(len(score), dtype=torch.bool).index_fill_(0, delta.indices, True)
        assert score[taken].min() >= score[~taken].max() * (1 - 1e-4)
        assert score[taken].sum() == pytest.approx(score.topk(len(delta.indices)).values.sum().item(), rel=1e-5)


def test_the_mask_of_a_transposed_weight_is_in_its_own_numbering() -> None:
    """GPT-2 stores [in, out]; positions are those in W [out, in]."""
    model = tiny.gpt2()
    gradients = dense_gradients(model)
    for name, delta in attached(model, rank=2, mask="gradient").items():
        score = gradients[f"{name}.weight"].T.abs().reshape(-1)
        assert score[delta.indices].min() >= score.topk(len(delta.indices)).values.min() * (1 - 1e-4)


def test_random_masks_depend_on_the_seed_and_cover_the_matrix() -> None:
    hits = torch.zeros(12 * 10)
    for seed in range(300):
        (delta,) = graft.attach(layer(12, 10), "shira", rank=1, seed=seed).deltas.values()
        hits[delta.indices] += 1
    expected = 300 * 22 / 120
    # hypergeometric counts have a slightly smaller variance than Poisson ones; 119 degrees, 0.999 quantile 173
    assert (hits - expected).square().sum() / expected < 173
    assert hits.min() > 0


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 12), columns=st.integers(1, 12), share=st.floats(0.01, 1))
def test_struct_is_the_diagonal_and_whole_rows(rows: int, columns: int, share: float) -> None:
    count = max(1, round(share * rows * columns))
    positions = structured((rows, columns), count)
    assert len(positions.unique()) == len(positions) == count
    grid = torch.zeros(rows, columns, dtype=torch.bool)
    grid.view(-1)[positions] = True
    if count >= min(rows, columns):
        assert grid.diagonal().all()
    off_diagonal = grid & ~torch.eye(rows, columns, dtype=torch.bool)
    full = [i for i in range(rows) if grid[i].all()]
    touched = [i for i in range(rows) if off_diagonal[i].any()]
    assert len([i for i in touched if i not in full]) <= 1  # the budget may end inside one row


def test_struct_has_a_high_rank() -> None:
    """Rows alone would have the rank of their number; the diagonal makes it full."""
    (delta,) = graft.attach(layer(40, 40).double(), "shira", rank=2, mask="struct").deltas.values()
    randomise(delta)
    assert torch.linalg.matrix_rank(delta.weight()[0] - delta.target.weight()) == 40


def test_few_entries_have_a_rank_far_above_loras() -> None:
    """64 x 64 with the parameters of a LoRA of rank 4."""
    (delta,) = graft.attach(layer(64, 64).double(), "shira", rank=4).deltas.values()
    randomise(delta)
    assert len(delta.values) == 2 * 64 * 4
    assert torch.linalg.matrix_rank(delta.weight()[0] - delta.target.weight()) > 32


def test_a_share_instead_of_a_rank() -> None:
    (delta,) = graft.attach(layer(30, 21), "shira", fraction=0.02).deltas.values()
    assert len(delta.values) == 13  # ceil(0.02 * 630)


@pytest.mark.parametrize("options", [{"rank": 6}, {"fraction": 1.0}])
def test_more_entries_than_there_are_is_refused(options: dict[str, float]) -> None:
    """6 * (10 + 9) = 114 > 90; all 90 of them are fine."""
    if "fraction" in options:
        assert graft.attach(layer(10, 9), "shira", **options).parameter_count == 90
        return
    with pytest.raises(graft.GraftError, match="114 entries do not fit"):
        graft.attach(layer(10, 9), "shira", **options)


# ---- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_gradients_are_the_dense_gradient_at_the_positions(make) -> None:
    """Off the start, against autograd on a dense copy whose weights are W + S."""
    model = make()
    deltas = attached(model, rank=2)
    twin = make().requires_grad_(True)
    for seed, (name, delta) in enumerate(deltas.items()):
        randomise(delta, seed, 0.05)
        with torch.no_grad():
            delta.target.view(twin.get_submodule(name).weight).copy_(delta.weight()[0])
    batch = tiny.causal_batches(1)[0]
    torch.testing.assert_close(model(**batch).loss, twin(**batch).loss)
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    for name, delta in deltas.items():
        dense = delta.target.view(twin.get_submodule(name).weight.grad).reshape(-1)
        torch.testing.assert_close(delta.values.grad, dense[delta.indices], atol=1e-6, rtol=1e-4)


def test_training_changes_the_weight_at_the_positions_and_nowhere_else() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "shira", rank=2)
    tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=3), tiny.causal_batches(), 3)
    for delta in adapter.deltas.values():
        changed = torch.nonzero((delta.weight()[0] != delta.target.weight()).reshape(-1)).flatten()
        assert torch.equal(changed, delta.indices)


# ---- switching ----------------------------------------------------------------------------------------------------------


def fleet(dtype: torch.dtype) -> tuple[Net, dict[str, SHiRADelta]]:
    """Two adapters with overlapping positions on one map."""
    model = layer(10, 9).to(dtype)
    deltas = {}
    for seed, name in enumerate(("one", "two")):
        (deltas[name],) = graft.attach(model, "shira", rank=2, name=name, seed=seed).deltas.values()
        randomise(deltas[name], seed)
    assert len(set(deltas["one"].indices.tolist()) & set(deltas["two"].indices.tolist())) > 3
    return model, deltas  # type: ignore[return-value]


def baked(delta: SHiRADelta) -> Tensor:
    module = slot_of(delta.target).baked
    assert module is not None
    return module.weight  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_switching_on_and_off_gives_the_original_bits(dtype: torch.dtype) -> None:
    """Every switch has the bits of W + S rounded once from fp32; entries that the old adapter alone had are W's own bits again."""
    model, deltas = fleet(dtype)
    W = model[0].weight.detach().clone()
    for name in ("one", "two", "one", "one", "two", "two", "one"):
        graft.switch(model, name)
        wanted = W.float().reshape(-1).clone()
        wanted[deltas[name].indices] += deltas[name].values.detach()
        assert torch.equal(baked(deltas[name]), wanted.view(10, 9).to(dtype))
    graft.detach(model)
    assert torch.equal(model[0].weight, W)


def test_a_switch_writes_the_positions_of_the_two_adapters_only() -> None:
    """Proof by a mark: what lies elsewhere in the baked weight survives."""
    model, deltas = fleet(torch.float32)
    graft.switch(model, "one")
    union = torch.cat([d.indices for d in deltas.values()]).unique()
    elsewhere = torch.ones(90, dtype=torch.bool).index_fill_(0, union, False)
    baked(deltas["one"]).view(-1)[elsewhere] = 123.0
    graft.switch(model, "two")
    assert (baked(deltas["two"]).view(-1)[elsewhere] == 123.0).all()


def test_fusion_adds_and_does_not_depend_on_the_order() -> None:
    """Disjoint positions commute to the bit: each entry is written by one adapter."""
    weights = []
    for order in (("one", "two"), ("two", "one")):
        model = layer(10, 9)
        deltas = {}
        for seed, name in enumerate(("one", "two")):
            (deltas[name],) = graft.attach(model, "shira", rank=2, name=name).deltas.values()
            randomise(deltas[name], seed)
        everything = torch.arange(90)
        for name, chosen in zip(("one", "two"), (everything[:38], everything[38:76]), strict=True):
            deltas[name].indices.copy_(chosen)
        for name in order:
            graft.adapters_of(model)[name].merge()
        weights.append(baked(deltas["one"]).clone())
    assert torch.equal(*weights)
    wanted = layer(10, 9)[0].weight.detach().reshape(-1).clone()
    wanted[:38] += deltas["one"].values.detach()
    wanted[38:76] += deltas["two"].values.detach()
    torch.testing.assert_close(weights[0].reshape(-1), wanted)
