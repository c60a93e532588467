"""What only MiSS promises: summed shards, the frozen LoRA that it equals, columns that repeat."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graft
from graft.methods.deltas.miss import MiSSDelta
from tests import tiny
from tests.methods.small import as_peft, layer, randomise


def miss(model: nn.Module, **options: float) -> MiSSDelta:
    (delta,) = graft.attach(model, "miss", **options).deltas.values()
    assert isinstance(delta, MiSSDelta)
    randomise(delta)
    return delta


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 4), repeats=st.integers(1, 3), width=st.integers(1, 9), rank=st.integers(1, 9), mini=st.booleans())
def test_shards_are_summed_and_columns_repeat(out: int, repeats: int, width: int, rank: int, mini: bool) -> None:
    """Entry by entry dW[o, j] = D[j mod r, o mod m], and x padded with zeros, cut into shards and summed."""
    rank, columns = min(rank, width), out * repeats
    model = layer(columns, width).double()
    delta = miss(model, rank=rank, **({"mini": out} if mini else {}))
    D = delta.D.detach()
    assert D.shape == (rank, out if mini else columns)
    x = torch.randn(3, width, dtype=torch.float64)
    W = model[0].weight.detach().clone()
    for o in range(columns):
        for j in range(width):
            W[o, j] += D[j % rank, o % D.shape[1]]
    torch.testing.assert_close(delta.weight()[0], W)
    summed = sum(F.pad(x[:, start : start + rank], (0, max(0, start + rank - width))) for start in range(0, width, rank))
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias) + summed @ D.repeat(1, columns // D.shape[1]))


def test_it_is_lora_with_a_frozen_projection() -> None:
    """A = [I I I'] with the last identity cut off, B = D^T, scale 1; also the gradient of B."""
    model, twin, x = layer(6, 9).double(), layer(6, 9).double(), torch.randn(4, 9, dtype=torch.float64)
    delta = miss(model, rank=4)
    (lora,) = graft.attach(twin, "lora", rank=4, alpha=4.0).deltas.values()
    with torch.no_grad():
        lora.A.copy_(torch.cat([torch.eye(4), torch.eye(4), torch.eye(4)[:, :1]], 1))
        lora.B.copy_(delta.D.T)
    torch.testing.assert_close(model(x), twin(x))
    for each in (model, twin):
        each(x).square().sum().backward()
    torch.testing.assert_close(delta.D.grad, lora.B.grad.T)
    assert torch.linalg.matrix_rank(delta.weight()[0] - model[0].weight) == 4


def test_the_first_backward_moves_everything() -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "miss", rank=5)
    model(**tiny.causal_batches(1)[0]).loss.backward()
    for delta in adapter.deltas.values():
        assert not delta.D.any()
        assert delta.D.grad.abs().sum(1).min() > 0  # every row


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(graft.GraftError, match=r"mini is 4.*divide the outputs"):
        graft.attach(layer(6, 9), "miss", rank=2, mini=4)
    with pytest.raises(graft.GraftError, match="choose 1 to 9"):
        graft.attach(layer(60, 9), "miss", rank=10)
    assert miss(layer(6, 9), rank=9).D.shape == (9, 6)  # wider than out, as PEFT allows


def test_trained_biases_of_peft_are_refused(tmp_path: Path) -> None:
    graft.attach(tiny.llama(), "miss", rank=5).save(tmp_path)
    as_peft(tmp_path)
    assert graft.load_adapter(tiny.llama(), tmp_path).method == "miss"
    as_peft(tmp_path, bias="all")
    with pytest.raises(graft.GraftError, match="bias = 'all', and Graft has 'none' only"):
        graft.load_adapter(tiny.llama(), tmp_path)
