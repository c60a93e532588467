"""What only VeRA promises: two vectors on bases that PEFT draws alike."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import graft
from tests import tiny
from tests.methods.small import layer, randomise

quiet = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks for it


def test_the_closed_form() -> None:
    model = layer().double()
    adapter = graft.attach(model, "vera", rank=4)
    (delta,) = adapter.deltas.values()
    randomise(delta)
    B, A = adapter.shared.vera_B[:6, :4].double(), adapter.shared.vera_A[:4, :9].double()
    torch.testing.assert_close(delta.weight()[0], model[0].weight + torch.diag(delta.b) @ B @ torch.diag(delta.d) @ A)


@quiet
def test_bases_are_those_that_peft_draws() -> None:
    ours = graft.attach(tiny.llama(), "vera", rank=7, seed=3, targets=["q_proj", "down_proj"]).shared
    config = peft.VeraConfig(r=7, projection_prng_key=3, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(tiny.llama(), config).base_model
    assert torch.equal(ours.vera_A, theirs.vera_A["default"])
    assert torch.equal(ours.vera_B, theirs.vera_B["default"])


@pytest.mark.parametrize("save", [False, True])
def test_bases_are_in_the_file_on_request(save: bool, tmp_path: Path) -> None:
    adapter = graft.attach(tiny.llama(), "vera", rank=7, save_bases=save)
    adapter.save(tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert ("base_model.vera_A" in names) == save
    assert len(names) == 2 * len(adapter.deltas) + 2 * save


@quiet
@pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A and vera_B:UserWarning")
def test_a_peft_file_without_its_bases_is_refused(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=7, target_modules=["q_proj"], save_projection=False)
    peft.get_peft_model(tiny.llama(), config).save_pretrained(str(tmp_path))
    with pytest.raises(graft.GraftError, match="save_projection=False"):
        graft.load_adapter(tiny.llama(), tmp_path)
