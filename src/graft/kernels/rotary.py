"""Rotary position embedding as one autograd function.

``y = x * cos + half(x) * sin``, ``half([a, b]) = [-b, a]``      x [batch, heads, length, d], cos and sin [batch, 1, length, d]

Against plain autograd: two passes over x instead of seven, and nothing but cos and sin is kept for the backward pass, which is the
transposed rotation. Source: Su et al. (arXiv 2104.09864), in the layout of GPT-NeoX and Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in one call; cos and sin get no gradient."""
    y: Tensor = _Rotate.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (a, b), (cos_a, cos_b), (sin_a, sin_b) = (t.chunk(2, -1) for t in (x, cos, sin))
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(a, cos_a, out=y[..., : a.shape[-1]]).addcmul_(b, sin_a, value=-1)
        torch.mul(b, cos_b, out=y[..., a.shape[-1] :]).addcmul_(a, sin_b)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (a, b), (cos_a, cos_b), (sin_a, sin_b) = (t.chunk(2, -1) for t in (gradient, *ctx.saved_tensors))
        dx = torch.empty_like(gradient)
        torch.mul(a, cos_a, out=dx[..., : a.shape[-1]]).addcmul_(b, sin_b)
        torch.mul(b, cos_b, out=dx[..., a.shape[-1] :]).addcmul_(a, sin_a, value=-1)
        return dx, None, None
