"""Deltas of the form ``W' = W R`` with R [in, in] (and perhaps something added): rotations, reflections, gains of the inputs.

``y = W R x + b``: R acts on the input before the map, which costs less than forming W R wherever R has structure.
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

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        if target.kind not in PLAIN:
            return super().forward(x)
        return target.apply(self.times(x, transposed=True).to(x.dtype), target.weight(), target.bias)
