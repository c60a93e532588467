"""Deltas of the form ``dW = s (B N A - B0 N0 A0)``: a square core N between two factors, each of them trained or frozen.

B [out, r], N [r, r], A [r, in], s = alpha / r. The frozen start B0 N0 A0 is there where the factors begin at something that is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored, check_rank, scaling
from graft.methods.families.rebuilt import Rebuilt

FACTORS = ("B", "N", "A")


class ThreeFactor(Rebuilt, Factored):
    """The factors that ``config.trained`` names are parameters; the others, and the start that is subtracted, are frozen."""

    config: ThreeFactorConfig
    B: Tensor
    N: Tensor
    A: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        check_rank(layout["rank"], self.target)
        self.scale, self.subtracted = float(layout["scale"]), bool(layout["subtracted"])
        frozen = {}
        for name, value in zip(FACTORS, self.config.start(self.target, layout["rank"], generator), strict=True):
            if name not in self.config.trained:
                frozen[name] = value
                continue
            setattr(self, name, nn.Parameter(value.to(self.target.dtype, copy=True).contiguous()))  # a copy: it may be a piece of W
            if self.subtracted:
                frozen[f"{name}0"] = value
        self.freeze_factors(self.config.saves_frozen, **frozen)

    def product(self) -> tuple[Tensor, Tensor]:
        B, A = self.B @ self.N * self.scale, self.A
        if not self.subtracted:
            return B, A
        B0, N0, A0 = (getattr(self, f"{name}0", getattr(self, name)) for name in FACTORS)
        start = B0 @ N0 * self.scale
        return (B - start, A) if A0 is A else (torch.cat([B, start], 1), torch.cat([A, -A0]))


@dataclass(frozen=True, kw_only=True)
class ThreeFactorConfig(DeltaConfig):
    """Hyper-parameters that all of them have. Subclasses define :meth:`start` and say which factors train."""

    rank: int = option(8, "rank r of the update", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: the rank", low=1e-6)

    kinds = LINEAR_KINDS
    delta = ThreeFactor
    trained: ClassVar[str] = "BNA"
    subtracted: ClassVar[bool] = False  # whether the start is not zero, so that it has to be taken off

    def start(self, target: Target, rank: int, generator: torch.Generator) -> Sequence[Tensor]:
        """B [out, r], N [r, r] and A [r, in] before training."""
        raise NotImplementedError

    @property
    def saves_frozen(self) -> bool:
        """Whether files hold the frozen factors; otherwise they are made again from W."""
        return True

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "scale": scaling(self.alpha, self.rank, 1.0), "subtracted": self.subtracted}

    def parameters(self, out_features: int, in_features: int) -> int:
        sizes = {"B": self.rank * out_features, "N": self.rank**2, "A": self.rank * in_features}
        return sum(sizes[name] for name in self.trained)
