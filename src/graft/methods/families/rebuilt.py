"""Frozen factors that are computed from W: a file need not hold them, since whoever loads it has W.

It holds a signature instead, a few numbers that the factors must give again: singular vectors of nearly equal singular values can turn
within their subspace on another machine, or beside a copy of W in another dtype, and the adapter would silently mean something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graft.core.config import option
from graft.core.delta import Delta
from graft.core.errors import GraftError

PROBES, TOLERANCE = 2, 1e-3  # of the factor's own size


def save_bases() -> Any:
    """The option of a method whose frozen factors can be made again."""
    return option(False, "write the frozen factors into the file; false: make them again from W")


class Rebuilt(Delta):
    """A delta with frozen factors, given to :meth:`freeze_factors` when it is built."""

    _rebuilt: tuple[str, ...] = ()  # names of the factors that files leave out

    @property
    def saved(self) -> bool:
        """Whether files hold the frozen factors."""
        return not self._rebuilt

    def freeze_factors(self, save: bool, **factors: Tensor) -> None:
        """Registers ``factors`` as buffers; with ``save`` they are in the file, else their signature is."""
        for name, value in factors.items():
            self.register_buffer(name, value.to(self.target.dtype, copy=True).contiguous())
        self._rebuilt = () if save else tuple(factors)
        self.not_saved = frozenset(self._rebuilt)

    def signature(self) -> Tensor:
        """``P F Q`` of every factor F with fixed random probes P, Q, over the size of F; one row of numbers for each."""
        return torch.stack([_signature(getattr(self, name)) for name in self._rebuilt])

    def exported(self) -> dict[str, Tensor]:
        return {**super().exported(), **({"signature": self.signature()} if self._rebuilt else {})}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        if self._rebuilt and not torch.allclose(self.signature(), exported["signature"].to(self.target.device), rtol=0, atol=TOLERANCE):
            raise GraftError(
                f"the factors of {self.target.name} cannot be made again from this copy of the base (another machine or dtype decides nearly equal "
                "singular values differently); save the adapter with save_bases=true where it was trained, or load the base as it was then."
            )
        super().restore(exported)


def _signature(factor: Tensor) -> Tensor:
    matrix = factor.detach().reshape(len(factor), -1).double().cpu()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, PROBES, generator=generator, dtype=torch.float64) for size in matrix.shape)
    numbers: Tensor = (left.T @ matrix @ right).flatten() / matrix.norm().clamp(min=1e-30)
    return numbers.to(factor)
