"""The output head and its cross-entropy as one autograd function that never holds the logits.

``loss = sum_i log sum_v exp(h_i . w_v) - h_i . w_{y_i}``      h [n, d], W [vocabulary, d] frozen, y [n]

The gradient is ``dh_i = sum_v p_iv w_v - w_{y_i}`` with ``p_i = softmax(W h_i)``: attention with the rows of W as keys and as values.
So it is computed as attention is, block by block of the vocabulary with a running maximum (Milakov and Gimelshein, arXiv 1805.02867;
FlashAttention), already in the forward pass: two products with W in all, and memory for one block of logits instead of four copies
of ``n x vocabulary``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graft.kernels.precision import working_dtype

BLOCK = 2**20  # logits that are held at once: they stay in the cache between the two products


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The definition."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same, summed over the n rows of ``hidden [n, d]``, in at least fp32; ``weight [vocabulary, d]`` gets no gradient."""
    dtype = working_dtype(hidden)
    loss: Tensor = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), labels)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        count, columns = len(hidden), max(1, BLOCK // max(1, len(hidden)))
        highest = hidden.new_full((count, 1), -torch.inf, dtype=exact)
        total = hidden.new_zeros(count, 1, dtype=exact)  # sum_v exp(logit - highest)
        mean = hidden.new_zeros(hidden.shape, dtype=exact)  # sum_v exp(logit - highest) w_v
        memory = hidden.new_empty(count * min(columns, len(weight)))  # one piece for all blocks: fresh memory costs more than the arithmetic
        wide = memory if exact == hidden.dtype else torch.empty_like(memory, dtype=exact)
        for block in torch.split(weight, columns):
            size = (count, len(block))
            logits = torch.mm(hidden, block.T, out=memory[: count * len(block)].view(size))
            shares = logits if wide is memory else wide[: count * len(block)].view(size).copy_(logits)
            before, highest = highest, torch.maximum(highest, shares.amax(1, keepdim=True))
            shares.sub_(highest).exp_()
            shrink = (before - highest).exp_()
            total.mul_(shrink).add_(shares.sum(1, keepdim=True))
            mean.mul_(shrink)
            if wide is memory:
                mean.addmm_(shares, block)
            else:
                mean.add_(logits.copy_(shares) @ block)
        own = weight[labels].to(exact)
        loss = (total.log() + highest - (hidden.to(exact) * own).sum(1, keepdim=True)).sum()
        ctx.save_for_backward(mean.div_(total).sub_(own).to(hidden.dtype) if ctx.needs_input_grad[0] else None)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (found,) = ctx.saved_tensors
        return None if found is None else found * gradient.to(found.dtype), None, None
