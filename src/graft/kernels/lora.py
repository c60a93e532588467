"""A frozen linear map with a low-rank branch as one autograd function.

``y = x W^T + b + (x A^T) B^T``      x [..., in], W [out, in], b [out], A [r, in], B [out, r]  (scale folded into B)

Against base + branch: the branch is added into the base product (``addmm``), inputs are flattened once, nothing but x and the
thin ``x A^T`` is kept for the backward pass, and no gradient of W exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.kernels.precision import working_dtype


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """The definition."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """The same in one call; W and b are frozen. Computes in x's dtype (autocast's where it is on), whatever that of the others."""
    dtype = working_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _LoraLinear.apply(x.to(dtype), weight.to(dtype), bias, A.to(dtype), B.to(dtype))  # type: ignore[no-untyped-call]
    return y


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        thin = rows @ A.T
        y = F.linear(rows, weight, bias).addmm_(thin, B.T)
        ctx.save_for_backward(rows, thin, weight, A, B)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, thin, weight, A, B = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        back = gradient @ B  # [n, r]
        dx = torch.addmm(gradient @ weight, back, A).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dA = back.T @ rows if ctx.needs_input_grad[3] else None
        dB = gradient.T @ thin if ctx.needs_input_grad[4] else None
        return dx, None, None, dA, dB
