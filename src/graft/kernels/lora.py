"""Frozen linear maps with low-rank branches as one autograd function; maps that read the same input share its projection.

``y_j = x W_j^T + b_j + (x A_j^T) B_j^T``      x [..., in], W_j [out_j, in], b_j [out_j], A_j [r_j, in], B_j [out_j, r_j]  (scale folded into B)

Against base + branch: the branch is added into the base product (``addmm``), inputs are flattened once, nothing but x (or what it can be
formed from again, ``kernels/recompute.py``) and the thin ``x A^T`` is kept for the backward pass, not even x where no A is trained, and no
gradient of W exists. Against one call a map (q, k, v; gate, up): the A_j are stacked into one projection, and the gradient of x is summed in
place. The order of the products is that of ``kernels/plan.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.kernels import plan
from graft.kernels.precision import working_dtype
from graft.kernels.recompute import Source, source_of


class LowRankMap(NamedTuple):
    """One map: W [out, in] and b [out] frozen, A [r, in] and B [out, r] trained."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor


def lora_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """The definition."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, A), B)


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    """The same in one call; W and b are frozen. Computes in x's dtype (autocast's where it is on), whatever that of the others."""
    return lora_linears(x, [LowRankMap(weight, bias, A, B)])[0]


def lora_linears(x: Tensor, maps: Sequence[LowRankMap]) -> tuple[Tensor, ...]:
    """:func:`lora_linear` of each map on one x, together."""
    dtype = working_dtype(x)
    tensors = [None if tensor is None else tensor.to(dtype) for each in maps for tensor in each]
    source = source_of(x) if x.dtype == dtype else None
    outputs: tuple[Tensor, ...] = _LoraLinears.apply(source, x.to(dtype), *tensors)  # type: ignore[no-untyped-call]
    return outputs


def _plan(rows: Tensor, each: LowRankMap) -> plan.Plan:
    outputs, inputs = each.weight.shape
    return plan.choose(plan.Shape(len(rows), inputs, outputs, len(each.A)), rows.dtype, rows.device.type)


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Source | None, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        maps = [LowRankMap(*tensors[start : start + 4]) for start in range(0, len(tensors), 4)]  # type: ignore[arg-type]
        rows = x.reshape(-1, x.shape[-1])
        plans = [_plan(rows, each) for each in maps]
        down = [each.A for each, chosen in zip(maps, plans, strict=True) if not chosen.merged_output]
        thin = rows @ _stack(down).T if down else rows.new_empty(len(rows), 0)  # [n, all thin ranks]
        outputs, start = [], 0
        for (weight, bias, A, B), chosen in zip(maps, plans, strict=True):
            if chosen.merged_output:
                y = F.linear(rows, torch.addmm(weight, B, A), bias)
            else:
                y = F.linear(rows, weight, bias).addmm_(thin[:, start : start + len(A)], B.T)
                start += len(A)
            # Autograd must not see a view, so that what follows may write into the output (ReLU(inplace=True)).
            outputs.append(torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight))))
        ctx.form, kept = (None, (rows,)) if source is None else (source.form, source.tensors)
        wanted = zip(plans, ctx.needs_input_grad[4::4], ctx.needs_input_grad[5::4], strict=True)
        if not any(wants_A or (wants_B and (chosen.merged_output or chosen.full_gradient)) for chosen, wants_A, wants_B in wanted):
            ctx.form, kept = None, ()
        ctx.save_for_backward(thin, *(tensor for weight, _, A, B in maps for tensor in (weight, A, B)), *kept)
        ctx.shape, ctx.plans = x.shape, plans
        ctx.set_materialize_grads(False)  # an output that nobody used costs nothing
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        thin, *tensors = ctx.saved_tensors
        kept = tensors[3 * len(ctx.plans) :]
        rows: Any = None  # where no product below reads it
        if kept:
            rows = kept[0] if ctx.form is None else ctx.form(*kept).reshape(-1, ctx.shape[-1])
        dx: Tensor | None = None
        found: list[Tensor | None] = []
        backs: list[tuple[Tensor, Tensor]] = []  # (g B, A) whose products are still to be added to dx
        start = 0
        for index, (chosen, gradient) in enumerate(zip(ctx.plans, gradients, strict=True)):
            weight, A, B = tensors[3 * index : 3 * index + 3]
            own = None if chosen.merged_output else thin[:, start : start + len(A)]
            start += 0 if chosen.merged_output else len(A)
            if gradient is None:
                found += [None] * 4
                continue
            gradient = gradient.reshape(-1, gradient.shape[-1])
            wants_x, (wants_A, wants_B) = ctx.needs_input_grad[1], ctx.needs_input_grad[4 * index + 4 : 4 * index + 6]
            back = None
            if (wants_x and not chosen.merged_input_gradient) or (wants_A and not chosen.full_gradient):
                back = gradient @ B  # [n, r]
            if wants_x:
                base = torch.addmm(weight, B, A) if chosen.merged_input_gradient else weight
                dx = gradient @ base if dx is None else dx.addmm_(gradient, base)
                if not chosen.merged_input_gradient and back is not None:
                    backs.append((back, A))
            dA = dB = None
            if chosen.full_gradient and (wants_A or wants_B):
                dense = gradient.T @ rows  # [out, in]
                dA, dB = B.T @ dense, dense @ A.T
            else:
                if wants_A and back is not None:
                    dA = back.T @ rows
                if wants_B:  # as [r, out]: with the short side first the product is faster
                    dB = ((rows @ A.T if own is None else own).T @ gradient).T
            found += [None, None, dA, dB]
        if dx is not None:
            if backs:
                dx = dx.addmm_(torch.cat([back for back, _ in backs], 1) if len(backs) > 1 else backs[0][0], _stack([A for _, A in backs]))
            dx = dx.view(ctx.shape)
        return None, dx, *found


def _stack(factors: Sequence[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(tuple(factors))
