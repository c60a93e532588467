"""Attention over short sequences by plain batched products, as one autograd function.

``o = drop(softmax(s q k^T + m)) v``      q [batch, heads, n, d], k and v [batch, groups, m, d], heads a multiple of groups, mask [.., .., n, m]

torch's fused attention wins on long sequences in fp32 without dropout. On a CPU it has no dropout (it falls back to a slow path that
copies) and its bf16 backward pass is slower than the products it consists of; up to some hundred positions, keeping the
probabilities [batch, heads, n, m] costs little. The heads that share a key are one product, so keys and values are never repeated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.kernels.dropout import draw
from graft.kernels.precision import working_dtype


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """The definition."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(2, 3) * scale + (0 if mask is None else mask)
    return F.dropout(scores.softmax(-1), dropout) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0) -> Tensor:
    """The same in one call; ``mask`` is added to the scores. A row that may attend to nothing gives not a number, as in the definition."""
    dtype = working_dtype(q)
    o: Tensor = _Attention.apply(q.to(dtype), k.to(dtype), v.to(dtype), mask, scale, dropout)  # type: ignore[no-untyped-call]
    return o


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float) -> Tensor:
        groups = k.shape[0] * k.shape[1]
        rows = q.reshape(groups, q.shape[1] // k.shape[1] * q.shape[2], q.shape[3])
        keys, values = (t.reshape(groups, *t.shape[2:]) for t in (k, v))
        scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(scale)
        if mask is not None:
            scores.view(*q.shape[:3], k.shape[2]).add_(mask)
        shares = torch.softmax(scores, -1)
        kept, ctx.kept = draw(shares.shape, dropout, q.device) if dropout else (None, 1.0)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape, v.shape)
        o = torch.bmm(_dropped(shares, kept, ctx.kept), values).view(*q.shape[:3], v.shape[-1])
        ctx.save_for_backward(rows, keys, values, shares, kept, o)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, shares, kept, o = ctx.saved_tensors
        along = (gradient * o).sum(-1).reshape(*rows.shape[:2], 1)  # sum of shares times their gradients, without either
        gradient = gradient.reshape(*rows.shape[:2], values.shape[-1])
        dropped = _dropped(shares, kept, ctx.kept)
        dv = torch.bmm(dropped.transpose(1, 2), gradient)
        dscores = torch.bmm(gradient, values.transpose(1, 2)).mul_(dropped).addcmul_(shares, along, value=-1).mul_(ctx.scale)
        found = torch.bmm(dscores, keys), torch.bmm(dscores.transpose(1, 2), rows), dv
        return *(t.view(shape) for t, shape in zip(found, ctx.shapes, strict=True)), None, None, None


def _dropped(shares: Tensor, kept: Tensor | None, scale: float) -> Tensor:
    return shares if kept is None else (shares * kept).mul_(scale)
