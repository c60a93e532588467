"""Deltas of the form ``W' = W R`` with R [in, in] (and perhaps something added): rotations, reflections, gains of the inputs.

``y = W R x + b``: R acts on the input before the map, or on W where W has fewer rows.
"""

from __future__ import annotations

from torch import Tensor

from graft.core.delta import Delta
from graft.methods.families.factored import PLAIN


class InputMap(Delta):
    """Subclasses define :meth:`times`."""

    def times(self, rows: Tensor, transposed: bool = False) -> Tensor:
        """``rows [..., in] @ R``; with ``transposed`` ``rows @ R^T``."""
        raise NotImplementedError

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self.times(self.target.weight().to(self.target.dtype)), self.target.bias

    def on_inputs(self, x: Tensor) -> bool:
        """Whether x is what R acts on in :meth:`forward`."""
        return self.target.kind in PLAIN and x.numel() <= self.target.weight().numel()

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        if not self.on_inputs(x):
            return super().forward(x)
        return target.apply(self.times(x, transposed=True).to(x.dtype), target.weight(), target.bias)
