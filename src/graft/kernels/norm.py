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
    return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in one call; ``weight`` gets no gradient."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        along = gradient.to(inverse.dtype) * weight
        share = (along * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
        return along.mul_(inverse).addcmul_(x, share, value=-1).to(x.dtype), None, None
