"""Gated activations as one autograd function.

``h = act(g) * u``      g, u [..., d]; act any elementwise function: SiLU makes SwiGLU, GELU makes GeGLU (Shazeer, arXiv 2002.05202)

Against plain autograd: g and u are kept for the backward pass; act(g), a third tensor of the widest shape in a block, is formed again, and
so is h, the fourth, where a fused linear map reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graft.kernels.recompute import remember

Activation = Callable[[Tensor], Tensor]


def gate_reference(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    """The definition."""
    return act(g) * u


def gate(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    """The same in one call; ``act`` holds nothing that is trained."""
    h: Tensor = _Gate.apply(act, g, u)  # type: ignore[no-untyped-call]
    return remember(h, partial(_gated, act), g, u)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, act: Activation, g: Tensor, u: Tensor) -> Tensor:
        ctx.save_for_backward(g, u)
        ctx.act = act
        return _gated(act, g, u)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor]:
        g, u = ctx.saved_tensors
        if type(ctx.act) is nn.SiLU:
            opened, dg = ctx.act(g), torch.ops.aten.silu_backward(gradient * u, g)
        else:
            with torch.enable_grad():
                leaf = g.detach().requires_grad_()
                opened = ctx.act(leaf)
                (dg,) = torch.autograd.grad(opened, leaf, gradient * u)
        return None, dg, _times(opened.detach(), g, gradient)


def _gated(act: Activation, g: Tensor, u: Tensor) -> Tensor:
    return _times(act(g), g, u)


def _times(opened: Tensor, g: Tensor, factor: Tensor) -> Tensor:
    """The product, in the memory of ``opened``, unless the activation gave g itself."""
    return opened * factor if opened.data_ptr() == g.data_ptr() else opened.mul_(factor)
