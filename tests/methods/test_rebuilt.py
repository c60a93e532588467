"""Frozen factors that files leave out: they come again from W, or loading says that they do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graft
from tests import tiny
from tests.methods.small import layer, randomise

METHODS = ["lora-xs", "int-tune", "svfit", "loldu"]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_holds_what_was_trained_and_a_signature(method: str, tmp_path: Path) -> None:
    sizes = {}
    for save in (False, True):
        model = layer(40, 50)
        adapter = graft.attach(model, method, rank=5, save_bases=save)
        (delta,) = adapter.deltas.values()
        randomise(delta)
        expected = delta.weight()[0].detach()
        adapter.save(tmp_path / str(save))
        sizes[save] = sum(value.numel() for value in load_file(tmp_path / str(save) / "adapter_model.safetensors").values())
        (loaded,) = graft.load_adapter(layer(40, 50), tmp_path / str(save)).deltas.values()
        assert torch.equal(loaded.weight()[0], expected)
    assert sizes[False] <= adapter.parameter_count + 12
    assert sizes[True] >= adapter.parameter_count + 5 * 90


@pytest.mark.parametrize("method", METHODS)
def test_another_base_is_noticed_even_unchecked(method: str, tmp_path: Path) -> None:
    """As a copy of W elsewhere might decide: the factors differ, and the adapter would mean something else."""
    graft.attach(layer(40, 50), method, rank=5).save(tmp_path / "without")
    graft.attach(layer(40, 50), method, rank=5, save_bases=True).save(tmp_path / "with")
    other = layer(40, 50, seed=1)
    with pytest.raises(graft.GraftError, match="save_bases=true"):
        graft.load_adapter(other, tmp_path / "without", check_base=False)
    assert graft.adapters_of(other) == {}
    (loaded,) = graft.load_adapter(other, tmp_path / "with", check_base=False).deltas.values()
    own = graft.attach(layer(40, 50), method, rank=5).deltas.values()
    for name, value in next(iter(own)).named_buffers():
        assert torch.equal(getattr(loaded, name), value)


def test_equal_singular_values_are_noticed(tmp_path: Path) -> None:
    """Where all singular values are equal, any rotation is a valid decomposition; a nudge of W decides which."""
    model = layer(8, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
    graft.attach(model, "svfit", rank=4).save(tmp_path)
    nudged = layer(8, 8)
    with torch.no_grad():
        nudged[0].weight.copy_(torch.eye(8) + 1e-5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(graft.GraftError, match="cannot be made again"):
        graft.load_adapter(nudged, tmp_path, check_base=False)


def test_training_goes_on_from_a_file_without_factors(tmp_path: Path) -> None:
    model = tiny.llama()
    adapter = graft.attach(model, "lora-xs", rank=4)
    tiny.train(model, adapter.optimizer(lr=0.1, total_steps=3), tiny.causal_batches(), 3)
    adapter.save(tmp_path)
    fresh = tiny.llama()
    loaded = graft.load_adapter(fresh, tmp_path, trainable=True)
    assert loaded.parameter_count == adapter.parameter_count
    one = tiny.train(model, adapter.optimizer(lr=0.1, total_steps=6), tiny.causal_batches(), 3)
    two = tiny.train(fresh, loaded.optimizer(lr=0.1, total_steps=6), tiny.causal_batches(), 3)
    assert one == two
