"""LaMDA++: :mod:`lamda` with ranks chosen from the spectra of the weights.

    E(W) = sum_{i <= r_low} S_i^2 / sum_i S_i^2;   the third of the targets with the lowest E gets the rank r + d, that with the highest
    r - d = r_low, the others r, so that the mean stays r;   d = spread r

Azizi et al., arXiv 2406.12832. The public code does not have it: what the paper describes (ranks by normalised energy, more to flat
spectra, a fixed average budget) is followed, with three candidate ranks and groups of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Layout
from graft.core.target import Target
from graft.methods.deltas.lamda import LaMDA
from graft.numerics.svd import truncated_svd


@dataclass(frozen=True, kw_only=True)
class LaMDAPlusPlus(LaMDA):
    """Hyper-parameters of LaMDA++; ``rank`` is the mean over the targets."""

    spread: float = option(0.5, "how far the smallest and the largest rank are from the mean, over the mean", low=0, high=1)

    def layouts(self, targets: Sequence[Target], model: nn.Module, seed: int, calibration: Any) -> dict[str, Layout]:
        layouts = super().layouts(targets, model, seed, calibration)
        distance = min(round(self.spread * self.rank), self.rank - 1)
        flattest_first = sorted(targets, key=lambda target: energy(target, self.rank - distance))
        third = len(targets) // 3
        for target in flattest_first[:third]:
            layouts[target.name]["rank"] += distance
        for target in flattest_first[len(targets) - third :]:
            layouts[target.name]["rank"] -= distance
        return layouts


def energy(target: Target, rank: int) -> float:
    """The share of ``||W||_F^2`` that its ``rank`` leading singular values hold."""
    weight = target.weight().to(target.dtype)
    return float(truncated_svd(weight, rank)[1].square().sum() / weight.square().sum().clamp(min=1e-30))


catalogue.register(
    Method("lamda++", "LaMDA++: LaMDA with ranks from the spectra of the weights", "arXiv 2406.12832", "delta",
           "LaMDA with more rank where W's spectrum is flat", LaMDAPlusPlus, random=False)
)  # fmt: skip
