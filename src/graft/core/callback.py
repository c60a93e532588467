"""Callbacks: what a method does during training, driven by the optimizer's own step hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from graft.core.adapter import Adapter

State: TypeAlias = dict[str, Tensor | int | float | str | bool | list[int] | None]


class Callback:
    """Base of what a method does while training; schedules count optimiser updates (``step``, from 0), never forwards.

    ``adapter``, ``optimizer`` and ``total_steps`` are set when the adapter is bound to its optimizer.
    """

    adapter: Adapter
    optimizer: torch.optim.Optimizer
    total_steps: int

    def on_start(self) -> None:
        """Once, when the adapter is bound to its optimizer."""

    def before_forward(self) -> None:
        """Before each training forward (ranks or masks are sampled here)."""

    def penalty(self) -> Tensor | None:
        """A scalar added to the loss once an update; its gradient is added before :meth:`before_update`."""
        return None

    def before_update(self, step: int) -> None:
        """Gradients are complete and unscaled; the parameters are not yet updated."""

    def after_update(self, step: int) -> None:
        """The parameters are updated; the gradients are still there."""

    def on_phase(self, name: str) -> None:
        """A change of phase that the user announces (a new task, a rewind)."""

    def before_eval(self) -> None:
        """Before an evaluation."""

    def on_export(self) -> None:
        """Before the adapter is saved or merged."""

    def state_dict(self) -> State:
        """All that a resumed run needs: tensors and plain JSON values."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """The inverse of :meth:`state_dict`."""
