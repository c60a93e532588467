"""What only S2FT promises: which units are trained, in which order they could be laid out, and what the backward pass keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.core.target import find_targets
from graft.methods.deltas.s2ft import S2FTDelta, coupled_order, unit_width
from tests import tiny
from tests.methods.small import randomise

HEAD, QUERY_HEADS, KEY_HEADS, CHANNELS = 10, 4, 2, 52


def s2ft(model: nn.Module, **shares: object) -> dict[str, S2FTDelta]:
    return dict(graft.attach(model, "s2ft", **{"down": 0.0, **shares}).deltas)  # type: ignore[arg-type]


def spread(units: Tensor, width: int) -> Tensor:
    """The channels of units."""
    return (units[:, None] * width + torch.arange(width)).flatten()


# ---- the order for a permuted copy -------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 20), data=st.data())
def test_coupled_order_makes_both_choices_one_slice(count: int, data: st.DataObject) -> None:
    first, second = (torch.tensor(sorted(data.draw(st.sets(st.integers(0, count - 1)))), dtype=torch.long) for _ in range(2))
    order = coupled_order(first, second, count)
    assert sorted(order.tolist()) == list(range(count))
    places = order.argsort()  # where each unit went
    assert (places[first].sort().values.diff() == 1).all()
    assert (places[second].sort().values.diff() == 1).all()
    if len(first):
        assert places[first].min() == 0  # the first choice leads


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
def test_permuting_a_block_leaves_its_function_and_can_be_undone(bias: bool) -> None:
    """MLP channels: rows of up and gate with columns of down. Attention: key-value heads together with their query heads (GQA)."""
    model = tiny.llama(bias=bias)
    batch = tiny.causal_batches(1)[0]
    before, original = model(**batch).logits, copy.deepcopy(model.state_dict())
    for block in model.model.layers:
        mlp, attention = block.mlp, block.self_attn
        channels = coupled_order(torch.tensor([3, 17, 40]), torch.tensor([17, 5]), CHANNELS)
        heads = coupled_order(torch.tensor([1]), torch.tensor([1]), KEY_HEADS)
        queries = spread(spread(heads, QUERY_HEADS // KEY_HEADS), HEAD)
        moves = [(mlp.up_proj, 0, channels), (mlp.gate_proj, 0, channels), (mlp.down_proj, 1, channels)]
        moves += [(m, 0, spread(heads, HEAD)) for m in (attention.k_proj, attention.v_proj)]
        moves += [(attention.q_proj, 0, queries), (attention.o_proj, 1, queries)]
        for module, dim, order in moves:
            assert not torch.equal(order, torch.arange(len(order)))
            module.weight.data = module.weight.data.index_select(dim, order)
            if module.bias is not None and dim == 0:
                module.bias.data = module.bias.data[order]
        torch.testing.assert_close(model(**batch).logits, before, atol=1e-5, rtol=1e-5)
        for module, dim, order in moves:
            module.weight.data = module.weight.data.index_select(dim, order.argsort())
            if module.bias is not None and dim == 0:
                module.bias.data = module.bias.data[order.argsort()]
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


# ---- what is chosen -----------------------------------------------------------------------------------------------------


def test_units_are_chosen_over_all_layers_together() -> None:
    """The total is exact and layers differ; another seed chooses others. 6 layers of 52 channels, 12%: 37."""
    model = tiny.llama(layers=6)
    counts = {}
    for seed in range(8):
        deltas = s2ft(model, down=0.12, seed=seed)
        assert sum(len(d.index) for d in deltas.values()) == round(0.12 * 6 * CHANNELS)
        counts[seed] = tuple(len(d.index) for d in deltas.values())
        graft.detach(model)
    assert all(len(set(each)) > 1 for each in counts.values())
    assert len(set(counts.values())) > 4


def test_random_choice_is_uniform() -> None:
    """Chi-square over layers and channels: 104 cells, 120 draws of 21; the 0.999 quantile at 103 degrees is 153."""
    model, hits = tiny.llama(), {name: torch.zeros(CHANNELS) for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")}
    for seed in range(120):
        for name, delta in s2ft(model, down=0.2, seed=seed).items():
            hits[name][delta.index] += 1
        graft.detach(model)
    observed, expected = torch.cat(list(hits.values())), 120 * 21 / 104
    assert (observed - expected).square().sum() / expected < 153


def test_heads_are_chosen_whole() -> None:
    """o: query heads as columns; v: key-value heads as rows, of which a GQA model has fewer."""
    model = tiny.llama(layers=4)
    deltas = s2ft(model, o=0.5, v=0.5)
    chosen = {"o": 0, "v": 0}
    for delta in deltas.values():
        role = delta.target.role
        heads = (delta.index.view(-1, HEAD)[:, 0] // HEAD).tolist()
        assert torch.equal(delta.index, spread(torch.tensor(heads), HEAD))
        assert max(heads) < (QUERY_HEADS if role == "o" else KEY_HEADS)
        assert delta.columns == (role == "o")
        chosen[role] += len(heads)
    assert chosen == {"o": 4 * QUERY_HEADS // 2, "v": 4 * KEY_HEADS // 2}


def test_width_of_a_unit() -> None:
    model = tiny.llama()
    widths = {t.role: unit_width(t, model) for t in find_targets(model, "linear")}
    assert (widths["down"], widths["up"], widths["o"], widths["v"]) == (1, 1, HEAD, HEAD)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("role", ["down", "up", "o", "v"])
def test_choice_by_the_norm_of_weights(role: str, smallest: bool) -> None:
    """No unit left out, in any layer, has a larger (smaller) norm than one taken."""
    model = tiny.llama(layers=3)
    deltas = s2ft(model, **{role: 0.5}, select="weight", smallest=smallest)
    taken, left = [], []
    for target in find_targets(model, role):
        width = HEAD if role in ("o", "v") else 1
        W = target.weight() if role in ("down", "o") else target.weight().T
        norms = W.reshape(len(W), -1, width).square().sum((0, 2))
        own = {i // width for i in deltas[target.name].index.tolist()} if target.name in deltas else set()
        for unit, norm in enumerate(norms.tolist()):
            (taken if unit in own else left).append(norm)
    assert min(left) >= max(taken) if smallest else min(taken) >= max(left)
    assert len(taken) == len(left)


def test_choice_by_activations() -> None:
    """The channels of down with the largest mean square input over the calibration tokens that are not padding."""
    model, batches = tiny.llama(), tiny.causal_batches(2)
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        t.module.register_forward_pre_hook(lambda m, args, name=t.name: rows.setdefault(name, []).append(args[0].detach()))
        for t in find_targets(model, "down")
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    present = [b["attention_mask"].bool() for b in batches]
    power = {n: torch.cat([x[m] for x, m in zip(xs, present, strict=True)]).square().mean(0) for n, xs in rows.items()}
    best = torch.cat(list(power.values())).topk(round(0.2 * 2 * CHANNELS)).values.min()
    deltas = s2ft(model, down=0.2, select="activation", calibration=batches)
    for name, scores in power.items():
        assert deltas[name].index.tolist() == torch.nonzero(scores >= best * (1 - 1e-6)).flatten().tolist()


def test_separate_shares_have_separate_lists() -> None:
    deltas = s2ft(tiny.llama(), down=0.2, up=0.1)
    found = {role: sum(len(d.index) for d in deltas.values() if d.target.role == role) for role in ("down", "up")}
    assert found == {"down": round(0.2 * 104), "up": round(0.1 * 104)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "share above 0"),
        ({"down": 0.1, "select": "activation"}, "calibration"),
        ({"up": 0.1, "select": "activation", "calibration": True}, "fits down and o"),
        ({"down": 0.1, "targets": ["q_proj"]}, "roles q"),
    ],
)
def test_choices_without_a_meaning_are_refused(options: dict[str, object], message: str) -> None:
    if options.pop("calibration", None):
        options["calibration"] = tiny.causal_batches(1)
    with pytest.raises(graft.GraftError, match=message):
        s2ft(tiny.llama(), **options)


# ---- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_the_slices_gradient_is_the_dense_gradients_slice(make) -> None:
    """Off the start, against autograd on a dense copy; rows and columns, in the weight's own numbering."""
    model = make()
    deltas = s2ft(model, down=0.2, up=0.1, o=0.5, **({"v": 0.5} if make is tiny.llama else {}))
    twin = make().requires_grad_(True)
    assert {d.columns for d in deltas.values()} == {True, False}
    for seed, (name, delta) in enumerate(deltas.items()):
        randomise(delta, seed, 0.05)
        W = delta.target.view(twin.get_submodule(name).weight).data
        where = (slice(None), delta.index) if delta.columns else (delta.index,)
        W[where] += delta.slice.detach()
    batch = tiny.causal_batches(1)[0]
    torch.testing.assert_close(model(**batch).logits, twin(**batch).logits, atol=1e-5, rtol=1e-5)
    model(**batch).loss.backward()
    twin(**batch).loss.backward()
    for name, delta in deltas.items():
        G = delta.target.view(twin.get_submodule(name).weight.grad)
        torch.testing.assert_close(delta.slice.grad, G[:, delta.index] if delta.columns else G[delta.index], atol=1e-6, rtol=1e-4)


def test_training_changes_the_chosen_rows_and_columns_only() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "s2ft", down=0.2, v=0.5)
    tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=3), tiny.causal_batches(), 3)
    for delta in adapter.deltas.values():
        changed = delta.weight()[0] != delta.target.weight()
        assert torch.nonzero(changed.any(0 if delta.columns else 1)).flatten().tolist() == delta.index.tolist()


def test_all_of_down_is_full_fine_tuning_of_down() -> None:
    """Share 1: the same weights as training the dense matrices, step for step."""
    model = tiny.llama()
    adapter = graft.attach(model, "s2ft", down=1.0)
    losses = tiny.train(model, adapter.optimizer(lr=1e-3, total_steps=4), tiny.causal_batches(), 4)
    twin = tiny.llama().requires_grad_(False)
    weights = [block.mlp.down_proj.weight.requires_grad_(True) for block in twin.model.layers]
    wanted = tiny.train(twin, torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0), tiny.causal_batches(), 4)
    assert losses == pytest.approx(wanted, abs=1e-5)
    for delta, weight in zip(adapter.deltas.values(), weights, strict=True):
        torch.testing.assert_close(delta.weight()[0], weight, atol=2e-5, rtol=1e-4)


def test_it_is_a_lora_whose_frozen_factor_selects() -> None:
    """Columns: A is rows of the identity; rows: B is columns of the identity."""
    for delta in s2ft(tiny.llama(), down=0.2, up=0.1).values():
        randomise(delta)
        B, A = delta.factors()
        W, dW = delta.target.weight(), delta.weight()[0] - delta.target.weight()
        torch.testing.assert_close(B @ A, dW, atol=1e-6, rtol=1e-5)
        selector = A if delta.columns else B.T
        assert torch.equal(selector, torch.eye(W.shape[1 if delta.columns else 0])[delta.index])


def test_the_backward_pass_keeps_the_chosen_columns_only() -> None:
    """Partial back-propagation: of down's input [4, 11, 52] only x[..., c] is saved."""
    model = tiny.llama()
    for name, delta in s2ft(model, down=0.1).items():
        x = torch.randn(4, 11, CHANNELS, requires_grad=True)
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = delta(x)
        own = [t for t in kept if t.data_ptr() not in (delta.target.weight().data_ptr(), delta.slice.data_ptr())]
        assert sum(t.numel() for t in own if t.is_floating_point()) == 4 * 11 * len(delta.index), name
        assert any(torch.equal(t.reshape(-1), x[..., delta.index].reshape(-1)) for t in own)
        y.square().sum().backward()
        assert x.grad is not None
