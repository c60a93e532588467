"""Frozen matrices that all deltas of one adapter share: random bases, drawn once in fp32 on the CPU from the adapter's seed, and transforms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from graft.core.target import Target


class Bases(nn.Module):
    """Tensors by name, ``bases.A``; each delta takes the leading part that fits its target.

    With ``save`` they are in the file; otherwise whoever loads it draws them again, on any machine the same.
    """

    def __init__(self, save: bool, **tensors: Tensor):
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value, persistent=save)

    def leading(self, name: str, *sizes: int) -> Tensor:
        """The leading part of a base with these sizes."""
        base: Tensor = getattr(self, name)
        return base[tuple(slice(size) for size in sizes)]


class Transforms(nn.Module):
    """``transform(size)`` [.., size] for every size that the targets have; made again on loading."""

    def __init__(self, targets: Sequence[Target], transform: Callable[[int], Tensor]):
        super().__init__()
        for size in sorted({size for target in targets for size in target.shape}):
            self.register_buffer(f"T{size}", transform(size).to(targets[0].dtype), persistent=False)

    def sides(self, target: Target) -> tuple[Tensor, Tensor]:
        """The transform of the outputs and that of the inputs."""
        T_out, T_in = (getattr(self, f"T{size}") for size in target.shape)
        return T_out, T_in


def largest(targets: Sequence[Target]) -> tuple[int, int]:
    """The largest out and the largest in among the targets."""
    out_features, in_features = (max(sizes) for sizes in zip(*(target.shape for target in targets), strict=True))
    return out_features, in_features


def kaiming(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """``U(-b, b)`` with ``b = sqrt(6 / columns)``: Kaiming's uniform rule for a matrix."""
    bound = math.sqrt(6 / shape[-1])
    return torch.empty(*shape).uniform_(-bound, bound, generator=generator)
