"""One or a few maps in a row: enough for what a method promises at a single target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# What PEFT 0.21.2 warns of whatever is right or wrong with the file: an attribute that transformers 5 renamed, our key 'graft' beside its
# own (and fan_in_fan_out where it knows linear maps only), that it saves embeddings along, and torch's note on the sparse tensors of its SHiRA.
quiet_peft = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    r"ignore:Unexpected keyword arguments \[('fan_in_fan_out', )?'graft'\]:UserWarning",
    "ignore:Setting .save_embedding_layers. to .True.:UserWarning",
    "ignore:Sparse invariant checks are implicitly disabled:UserWarning",
    # its RandLoRA names the shared bases once more for every layer; they are one tensor, which our file holds once
    "ignore:Found missing adapter keys.*randlora_[AB].default:UserWarning",
    "ignore:Failed to load the CUDA extension:UserWarning",
    "ignore:Setting boft_n_butterfly_factor to 1:UserWarning",
    "ignore:Invalid .oft_block_size. .*Adjusted:UserWarning",
    "ignore:Specified to not (save|load) vera_A and vera_B:UserWarning",
)


def as_peft(folder: Path, **changes: Any) -> Path:
    """An adapter's folder as PEFT would have written it, without our key and with ``changes`` in its config."""
    file = folder / "adapter_config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key != "graft"}
    file.write_text(json.dumps({**config, **changes}))
    return folder


class Net(nn.Module):
    """``net[i]`` is the i-th map, ``"0"``, ``"1"``, ... its target's name."""

    def __init__(self, *maps: nn.Module):
        super().__init__()
        self.maps = nn.Sequential(*maps)

    def __getitem__(self, index: int) -> nn.Module:
        return self.maps[index]

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)


def layer(out: int = 6, width: int = 9, bias: bool = True, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(nn.Linear(width, out, bias)).eval()


def conv(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(nn.Conv2d(4, 6, 3, padding=1)).eval()


def randomise(module: nn.Module, seed: int = 1, size: float = 0.5) -> None:
    """Sets every parameter of a delta to random values, so that it is off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
