"""Root-mean-square normalisation with a frozen gain as one autograd function.

``y = w * round(x / sqrt(mean(x^2) + eps))``      x [..., d], w [d]; inside in fp32, rounded to x's dtype before the gain, as Llama does

Against plain autograd: x and one number a row are kept for the backward pass instead of four tensors of x's size in fp32.
Source: Zhang and Sennrich (arXiv 1910.07467).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    y: Tensor = weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in one call; ``weight`` gets no gradient."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # mixed dtypes in one operation would be cast in each again
        inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        y: Tensor = (wide * inverse).to(x.dtype).mul_(weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, along = x.to(inverse.dtype), (gradient * weight).to(inverse.dtype)
        share = (along * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
        return along.mul_(inverse).addcmul_(wide, share, value=-1).to(x.dtype), None, None
