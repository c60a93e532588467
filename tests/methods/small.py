"""One or a few maps in a row: enough for what a method promises at a single target."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
