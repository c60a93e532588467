"""What only Comp-LoRA promises: the leading singular directions of W stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import graft
from graft.methods.deltas.comp_lora import CompLoRADelta
from tests.methods.small import layer, randomise


def one(model: nn.Module, **options: object) -> CompLoRADelta:
    (delta,) = graft.attach(model, "comp-lora", rank=2, **options).deltas.values()
    assert isinstance(delta, CompLoRADelta)
    return delta


def learned(model: nn.Module, adapter: graft.Adapter, steps: int = 5) -> None:
    optimizer = adapter.optimizer(lr=0.1, total_steps=steps, weight_decay=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, model[0].in_features, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_protected_directions_are_untouched_by_training(side: str) -> None:
    model = layer(8, 11).double()
    adapter = graft.attach(model, "comp-lora", rank=2, energy=0.7, side=side)
    (delta,) = adapter.deltas.values()
    learned(model, adapter)
    W, changed = model[0].weight.detach(), delta.weight()[0].detach()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = delta.layout["protected"]
    assert 1 <= k <= 6
    update = changed - W
    assert update.norm() > 1e-2
    left, right = (U[:, :k].T @ update).norm() / update.norm(), (update @ Vh[:k].T).norm() / update.norm()
    assert (left < 1e-12) == (side != "right")
    assert (right < 1e-12) == (side != "left")
    if side == "both":  # singular triplets of W are triplets of W'
        torch.testing.assert_close(changed @ Vh[:k].T, U[:, :k] * S[:k])
        torch.testing.assert_close(changed.T @ U[:, :k], Vh[:k].T * S[:k])


@pytest.mark.parametrize("energy", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_how_many_are_protected(energy: float) -> None:
    model = layer(8, 11).double()
    squared = torch.linalg.svdvals(model[0].weight.detach()).square()
    enough = next(k for k in range(9) if squared[:k].sum() >= energy * squared.sum() * (1 - 1e-12))
    assert one(model, energy=energy).layout["protected"] == min(enough, 6)  # 8 - rank


def test_with_nothing_protected_it_is_lora() -> None:
    model, twin = layer(), layer()
    learned(model, graft.attach(model, "comp-lora", rank=2, energy=0.0))
    learned(twin, graft.attach(twin, "lora", rank=2))
    assert torch.equal(model[0].graft.deltas["default"].weight()[0], twin[0].graft.deltas["default"].weight()[0])


def test_the_file_is_a_plain_lora(tmp_path: Path) -> None:
    import json

    model = layer(8, 11)
    adapter = graft.attach(model, "comp-lora", rank=2)
    (delta,) = adapter.deltas.values()
    randomise(delta)
    adapter.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    del config["graft"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (loaded,) = graft.load_adapter(layer(8, 11), tmp_path).deltas.values()
    torch.testing.assert_close(loaded.weight()[0], delta.weight()[0])
