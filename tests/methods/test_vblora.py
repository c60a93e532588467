"""What only VB-LoRA promises: mixtures of a few vectors, one bank for all targets, and where it starts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graft
from graft.methods.deltas.vblora import Bank, VBLoRADelta
from tests import tiny
from tests.methods.small import Net, as_peft, layer


def factors(delta: VBLoRADelta, bank: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], piece by piece; logits below the k largest become minus infinity."""

    def piece(logits: Tensor) -> Tensor:
        threshold = logits.sort(descending=True).values[top - 1]
        return torch.softmax(torch.where(logits >= threshold, logits, -math.inf), 0) @ bank

    A = torch.stack([torch.cat([piece(logits) for logits in row]) for row in delta.logits_A])
    B = torch.cat([torch.stack([piece(logits) for logits in pieces], 1) for pieces in delta.logits_B])
    return B, A


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 3), columns=st.integers(1, 3), length=st.integers(1, 4), count=st.integers(1, 6), data=st.data())
def test_piece_by_piece(rows: int, columns: int, length: int, count: int, data: st.DataObject) -> None:
    out, width, top = rows * length, columns * length, data.draw(st.integers(1, count))
    model = layer(out, width).double()
    rank = min(2, out, width)
    adapter = graft.attach(model, "vblora", rank=rank, vectors=count, length=length, top=top, bank_bound=1.0, logits_std=1.0)
    (delta,) = adapter.deltas.values()
    assert isinstance(delta, VBLoRADelta)
    bank = adapter.shared.vblora_vector_bank
    size = max(d for d in range(1, length + 1) if math.gcd(out, width) % d == 0)
    assert bank.shape == (count, size)
    B, A = factors(delta, bank, top)
    parameters = [delta.logits_A, delta.logits_B, bank]
    torch.testing.assert_close(delta.weight()[0], model[0].weight + B @ A)
    x, direction = torch.randn(3, width, dtype=torch.float64), torch.randn(3, out, dtype=torch.float64)
    wanted = torch.autograd.grad(x @ (model[0].weight + B @ A).T, parameters, direction)
    got = torch.autograd.grad(model(x), parameters, direction)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_one_bank_serves_all_targets_and_learns_from_all() -> None:
    model = Net(nn.Linear(12, 18), nn.Linear(18, 24)).double()
    adapter = graft.attach(model, "vblora", targets="all", rank=2, vectors=5, length=9, top=5)
    assert isinstance(adapter.shared, Bank)
    bank = adapter.shared.vblora_vector_bank
    assert bank.shape == (5, 6)  # the largest that divides 12, 18 and 24
    deltas = list(adapter.deltas.values())
    assert adapter.parameter_count == 5 * 6 + 5 * 2 * (12 + 18 + 18 + 24) // 6 == adapter.recipe.delta.total([d.target for d in deltas])
    x, direction = torch.randn(4, 12, dtype=torch.float64), torch.randn(4, 24, dtype=torch.float64)
    model(x).backward(direction)
    copies = [bank.detach().clone().requires_grad_(True) for _ in deltas]
    (W1, b1), (W2, b2) = ((d.target.weight() + torch.matmul(*factors(d, copy, 5)), d.target.bias) for d, copy in zip(deltas, copies, strict=True))
    torch.testing.assert_close(bank.grad, sum(torch.autograd.grad((x @ W1.T + b1) @ W2.T + b2, copies, direction)))


def test_the_start_is_beside_the_base_by_little() -> None:
    """Entries of dW have the spread sqrt(r) (0.02^2 / 3) / k; the logits have 0.1."""
    model = layer(128, 256)
    adapter = graft.attach(model, "vblora", rank=4, length=16, vectors=500, seed=3)
    (delta,), bank = adapter.deltas.values(), adapter.shared.vblora_vector_bank.detach()
    assert -0.02 <= bank.min() < -0.0199
    assert 0.0199 < bank.max() <= 0.02
    update = (delta.weight()[0] - model[0].weight).detach()
    assert update.std() == pytest.approx(2 * 0.02**2 / 3 / 2, rel=0.15)
    assert delta.logits_A.detach().std() == pytest.approx(0.1, rel=0.05)


def test_logits_learn_faster_than_the_bank() -> None:
    adapter = graft.attach(layer(8, 8), "vblora", rank=2, length=4, vectors=5)
    rates = {id(p): group["lr"] for group in adapter.optimizer(lr=0.01, total_steps=1).param_groups for p in group["params"]}
    (delta,) = adapter.deltas.values()
    assert rates == {id(delta.logits_A): 0.1, id(delta.logits_B): 0.1, id(adapter.shared.vblora_vector_bank): 0.01}


def test_vectors_outside_of_the_mixtures_do_not_move() -> None:
    model = layer(4, 4)
    adapter = graft.attach(model, "vblora", rank=1, length=4, vectors=50, top=1)
    model(torch.randn(3, 4)).square().sum().backward()
    (delta,) = adapter.deltas.values()
    chosen = {int(delta.logits_A.argmax()), int(delta.logits_B.argmax())}
    assert set(adapter.shared.vblora_vector_bank.grad.abs().sum(1).nonzero().flatten().tolist()) == chosen
    assert not delta.logits_A.grad.any()  # softmax of one


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(graft.GraftError, match="top is 5"):
        graft.attach(layer(), "vblora", vectors=4, top=5)
    graft.attach(tiny.llama(), "vblora", length=4).save(tmp_path)
    as_peft(tmp_path, save_only_topk_weights=True)
    with pytest.raises(graft.GraftError, match="save_only_topk_weights = True, and Graft has False only"):
        graft.load_adapter(tiny.llama(), tmp_path)
