"""Surgery on an optimizer's state by parameter and index: what a method needs when it prunes, grows or freezes.

Setting a gradient to zero is not freezing: momentum and weight decay go on. These helpers act on every state tensor that has
the parameter's shape (moments), whatever the optimizer calls them, and leave scalars (step counts) alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[tuple[str, Tensor]]:
    state = optimizer.state.get(parameter, {})
    return [(name, value) for name, value in state.items() if _is_moment(name, value, parameter)]


def _is_moment(name: str, value: object, parameter: Tensor) -> bool:
    """``step`` is named because it has the shape of a scalar parameter."""
    return name != "step" and isinstance(value, Tensor) and value.shape == parameter.shape


def reset(optimizer: torch.optim.Optimizer, parameter: Tensor, index: Tensor | None = None, dim: int = 0) -> None:
    """Sets the moments of ``parameter`` to zero, all of them or those at ``index`` along ``dim``."""
    for _, moment in _moments(optimizer, parameter):
        if index is None:
            moment.zero_()
        else:
            moment.index_fill_(dim, index.to(moment.device), 0.0)


def permute(optimizer: torch.optim.Optimizer, parameter: Tensor, order: Tensor, dim: int = 0) -> None:
    """Reorders the moments as ``parameter.index_select(dim, order)`` reorders the parameter."""
    for name, moment in _moments(optimizer, parameter):
        optimizer.state[parameter][name] = moment.index_select(dim, order.to(moment.device))


def drop(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Forgets all state of ``parameter``, step count included, and frees its memory."""
    optimizer.state.pop(parameter, None)


def replace(optimizer: torch.optim.Optimizer, old: torch.nn.Parameter, new: torch.nn.Parameter, index: Tensor, dim: int = 0) -> None:
    """Puts ``new`` in the place of ``old``, keeping the moments at ``index`` along ``dim`` (``new`` is ``old`` at ``index``)."""
    kept = {
        name: value.index_select(dim, index.to(value.device)) if _is_moment(name, value, old) else value
        for name, value in optimizer.state.pop(old, {}).items()
    }
    if kept:
        optimizer.state[new] = kept
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
