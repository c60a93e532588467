"""A frozen linear map with a sparse update at fixed positions as one autograd function.

``y = x (W + S)^T + b``      x [..., in], W [out, in], b [out], S = zeros with ``values [k]`` at flat ``indices [k]``

Against plain autograd through ``W + S``: the adapted weight is formed again in the backward pass instead of kept, which would be
a second copy of the model, and its dense gradient lives for one layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.kernels.precision import working_dtype


def scatter(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``W + S``; indices are unique."""
    return weight.reshape(-1).index_add(0, indices, values).view(weight.shape)


def sparse_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, values: Tensor) -> Tensor:
    """The definition."""
    return F.linear(x, scatter(weight, indices, values), bias)


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, values: Tensor) -> Tensor:
    """The same in one call; W and b are frozen. Computes in x's dtype (autocast's where it is on), whatever that of the others."""
    dtype = working_dtype(x)
    bias = None if bias is None else bias.to(dtype)
    y: Tensor = _SparseLinear.apply(x.to(dtype), weight.to(dtype), bias, indices, values.to(dtype))  # type: ignore[no-untyped-call]
    return y


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, indices, values)
        y = F.linear(x, scatter(weight, indices, values), bias)
        no_view: Tensor = torch.ops.aten._unsafe_view(y, y.shape)  # so that what follows may write into it
        return no_view

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, indices, values = ctx.saved_tensors
        dx = gradient @ scatter(weight, indices, values) if ctx.needs_input_grad[0] else None
        dvalues = None
        if ctx.needs_input_grad[4]:
            dense = gradient.reshape(-1, gradient.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            dvalues = dense.reshape(-1)[indices]
        return dx, None, None, None, dvalues
