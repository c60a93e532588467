"""What only LoRA, rsLoRA and LoRA+ promise."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.families.factored import LowRank
from tests import tiny
from tests.methods.small import Net, layer


def filled(adapter: graft.Adapter, seed: int = 1) -> LowRank:
    """The only delta, its factors set to random values."""
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, LowRank)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (delta.A, delta.B):
            p.copy_(torch.randn(p.shape, generator=generator))
    return delta


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 9), width=st.integers(1, 9), rank=st.integers(1, 9), alpha=st.floats(0.5, 9), rslora=st.booleans(), bias=st.booleans())
def test_gradients_are_those_of_the_dense_weight_through_the_factors(out: int, width: int, rank: int, alpha: float, rslora: bool, bias: bool) -> None:
    """dB = s G A^T and dA = s B^T G with G = dL/dW' from autograd on a dense map."""
    rank = min(rank, out, width)
    model = layer(out, width, bias).double()
    delta = filled(graft.attach(model, "lora", rank=rank, alpha=alpha, rslora=rslora))
    s = alpha / (math.sqrt(rank) if rslora else rank)
    x = torch.randn(5, width, dtype=torch.float64)
    with torch.no_grad():
        dense = (model[0].weight + s * delta.B @ delta.A).requires_grad_(True)
    (G,) = torch.autograd.grad(F.linear(x, dense, model[0].bias).square().sum(), dense)
    model(x).square().sum().backward()
    torch.testing.assert_close(delta.B.grad, s * G @ delta.A.detach().T)
    torch.testing.assert_close(delta.A.grad, s * delta.B.detach().T @ G)


def test_gradients_of_a_convolution_and_an_embedding() -> None:
    torch.manual_seed(0)
    conv, table = Net(nn.Conv2d(3, 7, 3, stride=2, padding=1)), Net(nn.Embedding(11, 6))
    x, ids = torch.randn(2, 3, 5, 5), torch.tensor([[1, 4, 4], [0, 10, 2]])
    for model, given_, kind in ((conv, x, "conv"), (table, ids, "embedding")):
        delta = filled(graft.attach(model, "lora", targets="0", rank=3, alpha=6))
        with torch.no_grad():
            change = 2.0 * delta.B @ delta.A
            stored = model[0].weight + (change.reshape(7, 3, 3, 3) if kind == "conv" else change.T)
        stored.requires_grad_(True)
        y = F.conv2d(x, stored, model[0].bias, 2, 1) if kind == "conv" else F.embedding(ids, stored)
        torch.testing.assert_close(model(given_), y)
        (G,) = torch.autograd.grad(y.square().sum(), stored)
        G = G.flatten(1) if kind == "conv" else G.T
        model(given_).square().sum().backward()
        torch.testing.assert_close(delta.B.grad, 2.0 * G @ delta.A.detach().T, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(delta.A.grad, 2.0 * delta.B.detach().T @ G, atol=1e-4, rtol=1e-4)


def test_the_first_backward_moves_one_factor_only() -> None:
    """The factor that multiplies zeros gets no gradient: A for linear maps, B for embeddings, where A is the zero one."""
    model = tiny.llama()
    adapter = graft.attach(model, "lora", targets=["linear", "embedding"], rank=3)
    model(**tiny.causal_batches(1)[0]).loss.backward()
    for delta in adapter.deltas.values():
        moving, still = (delta.A, delta.B) if delta.target.kind == "embedding" else (delta.B, delta.A)
        assert not still.grad.any()
        assert moving.grad.any()


@pytest.mark.parametrize("training", [True, False])
def test_the_start_is_the_base_to_the_bit_also_with_dropout(training: bool) -> None:
    model = tiny.llama(bias=True)
    batch = tiny.causal_batches(1)[0]
    base = model(**batch).logits
    graft.attach(model, "lora", rank=3, dropout=0.5)
    model.train(training)
    assert torch.equal(model(**batch).logits, base)


def test_dropout_acts_on_the_input_of_the_branch_only() -> None:
    model = layer()
    delta = filled(graft.attach(model, "lora", rank=2, alpha=5, dropout=0.4))
    x = torch.randn(4, 9)
    model.train()
    torch.manual_seed(3)
    seen = model(x)
    torch.manual_seed(3)
    wanted = F.linear(x, model[0].weight, model[0].bias) + 2.5 * F.dropout(x, 0.4) @ delta.A.T @ delta.B.T
    torch.testing.assert_close(seen, wanted)
    model.eval()
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight + 2.5 * delta.B @ delta.A, model[0].bias))


def test_distribution_of_the_start() -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), whose deviation is 1/sqrt(3 in); embeddings: A = 0, B ~ N(0, 1)."""
    torch.manual_seed(0)
    model = Net(nn.Linear(400, 60), nn.Embedding(100, 400))
    linear, table = graft.attach(model, "lora", targets=["0", "1"], rank=50).deltas.values()
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < linear.A.abs().max() <= bound
    assert abs(linear.A.std() * math.sqrt(3 * 400) - 1) < 0.02
    assert not linear.B.any()
    assert not table.A.any()
    assert abs(table.B.std() - 1) < 0.02
    assert abs(table.B.mean()) < 0.02


def test_rank_of_the_update() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "lora", rank=3)
    tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=3), tiny.causal_batches(), 3)
    for delta in adapter.deltas.values():
        difference = (delta.weight()[0] - delta.target.weight()).double()
        S = torch.linalg.svdvals(difference)
        assert S[2] > 1e-3 * S[0]
        assert S[3] < 1e-5 * S[0]


def test_rslora_is_lora_with_another_alpha() -> None:
    """r = 4, alpha = 8 under rsLoRA has the scale 8 / 2, as LoRA with alpha = 16 has 16 / 4: the same run, bit for bit."""
    runs = []
    for options in ({"alpha": 8.0, "rslora": True}, {"alpha": 16.0}):
        model = tiny.llama()
        adapter = graft.attach(model, "lora", rank=4, **options)
        losses = tiny.train(model, adapter.optimizer(lr=1e-2, total_steps=3), tiny.causal_batches(), 3)
        runs.append((losses, {n: t.clone() for n, t in adapter.tensors().items()}))
    assert runs[0][0] == runs[1][0]
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name])


def test_default_alpha_is_twice_the_rank() -> None:
    (delta,) = graft.attach(layer(), "lora", rank=3).deltas.values()
    assert delta.pair().scale == 2.0


def test_the_first_gradient_shrinks_with_the_rank_only_without_rslora() -> None:
    """|dB| = s |G A^T| grows like s sqrt(r): so it falls like 1/sqrt(r) under alpha / r and stays under alpha / sqrt(r)."""
    sizes: dict[bool, list[float]] = {True: [], False: []}
    for rslora, found in sizes.items():
        for rank in (4, 64):
            model = layer(96, 128)
            (delta,) = graft.attach(model, "lora", rank=rank, alpha=8.0, rslora=rslora).deltas.values()
            model(torch.randn(32, 128, generator=torch.Generator().manual_seed(1))).square().sum().backward()
            found.append(delta.B.grad.norm().item())
    assert 3.2 < sizes[False][0] / sizes[False][1] < 5  # sqrt(64 / 4)
    assert 0.8 < sizes[True][0] / sizes[True][1] < 1.25


def test_two_adapters_add_up_and_none_is_the_base() -> None:
    model = layer()
    x = torch.randn(4, 9)
    base = model(x)
    first = filled(graft.attach(model, "lora", rank=2, name="first"), 1)
    two = graft.attach(model, "lora", rank=3, alpha=3, name="second")
    second = filled(two, 2)
    torch.testing.assert_close(model(x), base + x @ (2 * first.B @ first.A + second.B @ second.A).T)
    two.active = False
    torch.testing.assert_close(model(x), base + x @ (2 * first.B @ first.A).T)
    graft.adapters_of(model)["first"].active = False
    assert torch.equal(model(x), base)


# ---- LoRA+ --------------------------------------------------------------------------------------------------------------


def by_hand(ratio: float, lr: float, decay: float = 0.0, steps: int = 4) -> list[Tensor]:
    """A LoRA run with AdamW groups made here: A at lr, B at ratio times lr."""
    model = tiny.llama()
    adapter = graft.attach(model, "lora", rank=3)
    pairs = adapter.pairs().values()
    groups = [{"params": [p.A for p in pairs], "lr": lr}, {"params": [p.B for p in pairs], "lr": lr * ratio}]
    if ratio == 1:
        groups = [{"params": adapter.parameters(), "lr": lr}]
    tiny.train(model, torch.optim.AdamW(groups, weight_decay=decay, fused=True), tiny.causal_batches(), steps)
    return [p.detach().clone() for p in adapter.parameters()]


@pytest.mark.parametrize("ratio", [1.0, 16.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_is_adamw_with_two_learning_rates(ratio: float, decay: float) -> None:
    """With ratio 1 it is AdamW with one group, to the bit."""
    model = tiny.llama()
    adapter = graft.attach(model, "lora", rank=3, lr_ratio=ratio)
    tiny.train(model, adapter.optimizer(lr=2e-3, total_steps=4, weight_decay=decay), tiny.causal_batches(), 4)
    for seen, wanted in zip(adapter.parameters(), by_hand(ratio, 2e-3, decay), strict=True):
        assert torch.equal(seen, wanted)


@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(0.1, 50), lr=st.floats(1e-5, 1e-1), steps=st.integers(0, 7))
def test_the_ratio_survives_a_scheduler(ratio: float, lr: float, steps: int) -> None:
    adapter = graft.attach(layer(), "lora", rank=2, lr_ratio=ratio)
    optimizer = adapter.optimizer(lr=lr, total_steps=9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
    (pair,) = adapter.pairs().values()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(pair.A)] == pytest.approx(lr / (1 + steps))
    assert rates[id(pair.B)] == pytest.approx(ratio * rates[id(pair.A)])


def test_a_learning_rate_of_zero_holds_every_parameter_once() -> None:
    """Two equal rates (both 0, before a warm-up raises them) are still two groups."""
    adapter = graft.attach(layer(), "lora", rank=2, lr_ratio=4.0)
    optimizer = adapter.optimizer(lr=0.0, total_steps=9)
    assert sorted(id(p) for g in optimizer.param_groups for p in g["params"]) == sorted(map(id, adapter.parameters()))


def test_heads_learn_at_the_rate_of_b() -> None:
    """As in the authors' code, what is trained beside the pairs (a new head, vectors) goes with B; vectors get no decay."""
    model = tiny.bert()
    adapter = graft.attach(model, "lora", rank=2, lr_ratio=8.0, modules_to_save=["classifier"])
    optimizer = adapter.optimizer(lr=1e-3, total_steps=1, weight_decay=0.1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    head = adapter.deltas["classifier"]
    assert sorted(found[id(p)] for p in head.parameters()) == [(8e-3, 0.0), (8e-3, 0.1)]
    assert all(found[id(pair.A)] == (1e-3, 0.1) for pair in adapter.pairs().values())
