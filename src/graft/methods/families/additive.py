"""Deltas of the form ``W' = W + dW`` whose dense dW is computed from few numbers: spectra, kernels, products entry by entry."""

from __future__ import annotations

from torch import Tensor

from graft.core.delta import Delta


class Additive(Delta):
    """Subclasses define :meth:`update`; the map is run with W' itself, since no factors would be cheaper."""

    def update(self) -> Tensor:
        """``dW [out, in]``, effective scale folded in, differentiable."""
        raise NotImplementedError

    def weight(self) -> tuple[Tensor, Tensor | None]:
        update = self.update()
        return self.target.weight().to(update.dtype) + update, self.target.bias
