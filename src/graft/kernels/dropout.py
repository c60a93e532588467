"""Dropout from sixteen random bits an element.

``y = x * mask / keep``, mask ~ Bernoulli(keep), keep = 1 - round(65536 p) / 65536

torch draws a random number of 32 bits for every element, one after the other on a CPU, however many threads there are; four
elements can share one draw of 64. The probability is exact to 2^-17, and the scale is that of the probability drawn, so the mean is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = 2**16


def dropout_reference(x: Tensor, p: float) -> Tensor:
    """The definition."""
    return torch.nn.functional.dropout(x, p)


def dropout(x: Tensor, p: float) -> Tensor:
    """The same in distribution; ``0 <= p < 1``."""
    y: Tensor = _Dropout.apply(x, p)  # type: ignore[no-untyped-call]
    return y


def draw(shape: Sequence[int], p: float, device: torch.device) -> tuple[Tensor, float]:
    """A mask of ``shape`` (int8, 1: kept; a product with bool is slower) and the scale ``1 / keep`` of what is kept."""
    dropped = round(p * STEPS)
    size = torch.Size(shape).numel()
    bits = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None).view(torch.int16)[:size]
    return (bits >= dropped - STEPS // 2).view(torch.int8).view(*shape), STEPS / (STEPS - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask, ctx.scale = draw(x.shape, p, x.device)
        ctx.save_for_backward(mask)
        return (x * mask).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (gradient * mask).mul_(ctx.scale), None
