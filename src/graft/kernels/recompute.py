"""Inputs that can be formed again from tensors that are kept for the backward pass anyway, so that nobody else needs to keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NAME = "_graft_source"


class Source(NamedTuple):
    """``form(*tensors)`` is the tensor that this belongs to, as it was at ``version``."""

    form: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    version: int


def remember(y: Tensor, form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Notes on ``y`` how to form it again; returns it."""
    if torch.is_grad_enabled() and not y.is_inference():
        setattr(y, _NAME, Source(form, tensors, y._version))
    return y


def source_of(x: Tensor) -> Source | None:
    """How to form ``x`` again; None where nobody said, or it was written to since."""
    source = getattr(x, _NAME, None)
    return source if isinstance(source, Source) and source.version == x._version else None
