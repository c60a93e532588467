"""SALT: scales and shifts the leading singular values of W; the rest of its spectrum gets a low-rank core.

    W = U S V^T, k = min(out, in);  W' = U M V^T,  M = [[phi(diag(alpha S_1 + beta)), 0], [0, diag(S_2) + X Y]]
    alpha [rho] = 1, beta [rho] = 0;  X [k - rho, r] ~ 0.01 N(0, 1), Y [r, k - rho] = 0;  phi = ReLU
    penalty  lambda (||phi(alpha S_1 + beta) - S_1||^2 + ||X Y||_F^2)

Elsayed et al., arXiv 2503.16055. The code takes phi of all of M, which cuts negative entries of X Y off and ends their gradient, draws Y
too, so that it begins off the base, and penalises plain norms, whose pull does not shrink with the deviation: ``relu_scope="all"`` and
``squared=False`` are its phi and its norms. What is added to W is computed without W = U S V^T, so nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored, cheaper_in_factors, check_rank
from graft.methods.families.rebuilt import Rebuilt, save_bases
from graft.numerics.svd import truncated_svd


class SALTDelta(Rebuilt, Factored):
    """``alpha`` and ``beta`` [rho], X and Y, between frozen U [out, k], S [k] and V [k, in]."""

    config: SALT
    U: Tensor
    S: Tensor
    V: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, scaled, rank, dtype = self.target, layout["scaled"], layout["rank"], self.target.dtype
        check_rank(rank, target)
        check_rank(scaled or 1, target, "scaled")
        U, S, V = truncated_svd(target.weight().to(dtype), min(target.shape))
        self.freeze_factors(self.config.save_bases, U=U, S=S, V=V)
        self.alpha, self.beta = nn.Parameter(torch.ones(scaled, dtype=dtype)), nn.Parameter(torch.zeros(scaled, dtype=dtype))
        self.X = nn.Parameter(0.01 * torch.randn(len(S) - scaled, rank, generator=generator).to(dtype))
        self.Y = nn.Parameter(torch.zeros(rank, len(S) - scaled, dtype=dtype))

    def change(self) -> Tensor:
        """What the leading singular values [rho] grow by."""
        S = self.S[: len(self.alpha)]
        scaled = self.alpha * S + self.beta
        return (scaled if self.config.relu_scope == "none" else scaled.relu()) - S

    def product(self) -> tuple[Tensor, Tensor]:
        scaled = len(self.alpha)
        B, A = self.U[:, scaled:] @ self.X, self.Y @ self.V[scaled:]
        if self.config.relu_scope == "all":
            S = self.S[scaled:].diag()
            B, A = self.U[:, scaled:] @ ((S + self.X @ self.Y).relu() - S), self.V[scaled:]
        return torch.cat([self.U[:, :scaled] * self.change(), B], 1), torch.cat([self.V[:scaled], A])

    def forward(self, x: Tensor) -> Tensor:
        if not cheaper_in_factors(x, self.target, len(self.S)):
            return Delta.forward(self, x)
        return super().forward(x)

    @classmethod
    def together(cls, deltas: Sequence[Delta], x: Tensor) -> None:
        """One by one, each in its cheaper way."""


@dataclass(frozen=True, kw_only=True)
class SALT(DeltaConfig):
    """Hyper-parameters of SALT."""

    rank: int = option(4, "rank r of the core X Y", paper="4..256", low=1)
    scaled: int | None = option(None, "leading singular values rho that are scaled; none: all but 2 r", paper="760 of 768, 250 of 256", low=0)
    relu_scope: Literal["diag", "all", "none"] = option("diag", "where phi cuts negative values off: the scaled values, all of M, nowhere")
    penalty: float = option(0.0, "weight lambda of the penalty", paper="0", low=0)
    squared: bool = option(True, "penalise squared norms; false: the norms themselves")
    save_bases: bool = save_bases()

    kinds = LINEAR_KINDS
    delta = SALTDelta

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.penalty:
            self.refuse_unused("there is no penalty", "squared")

    def callbacks(self) -> list[Callback]:
        return [Penalty(self)] if self.penalty else []

    def count(self, shape: tuple[int, int]) -> int:
        """How many singular values are scaled at a target of this shape."""
        return max(0, min(shape) - 2 * self.rank) if self.scaled is None else self.scaled

    def layout_at(self, target: Target) -> Layout:
        return {"scaled": self.count(target.shape), "rank": self.rank}

    def parameters(self, out_features: int, in_features: int) -> int:
        shape = (out_features, in_features)
        return 2 * self.count(shape) + 2 * self.rank * (min(shape) - self.count(shape))


class Penalty(Callback):
    """Keeps the update small in the singular basis."""

    def __init__(self, config: SALT):
        self.config = config

    def penalty(self) -> Tensor:
        parts = [part for d in self.adapter.deltas.values() if isinstance(d, SALTDelta) for part in (d.change(), d.X @ d.Y)]
        norms = torch.stack([torch.linalg.vector_norm(part) for part in parts])
        return self.config.penalty * (norms.square() if self.config.squared else norms).sum()


catalogue.register(
    Method("salt", "SALT: Singular Value Adaptation with Low-Rank Transformation", "arXiv 2503.16055", "delta",
           "scaled singular values and a low-rank core", SALT)
)  # fmt: skip
