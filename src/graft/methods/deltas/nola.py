"""NOLA: the factors of LoRA as linear combinations of frozen random matrices, so that only the coefficients are trained and stored.

    A = A0 + sum_i a_i P_i,   B = sum_i c_i Q_i,   dW = s B A,   s = alpha / r
    P_i [r, in], Q_i [out, r] ~ U(-1, 1) / sqrt(k),  A0 ~ U(-1/sqrt(in), 1/sqrt(in)) frozen;   a, c [k] trained from 0

Koohpayegani et al., arXiv 2310.02556. The paper's formula has no A0, without which every gradient would vanish; the authors' code has it. The
random matrices are shared by all targets of the adapter (sliced to fit), drawn from its seed, and never stored; the authors' merge leaves
them out, here dW is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.bases import Bases, largest
from graft.methods.families.factored import Factored, check_rank, scaling, uniform


class NOLADelta(Factored):
    """Coefficients ``a`` and ``c`` [k]; the matrices they weigh belong to the adapter."""

    not_saved = frozenset({"A0"})
    shared: Bases
    A0: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, target = float(layout["scale"]), self.target
        check_rank(layout["rank"], target)
        self.register_buffer("A0", uniform(layout["rank"], target.shape[1], generator, target.dtype))
        self.a, self.c = (nn.Parameter(torch.zeros(layout["count"], dtype=target.dtype)) for _ in range(2))

    def product(self) -> tuple[Tensor, Tensor]:
        out_features, in_features = self.target.shape
        P, Q = self.shared.leading("P", in_features), self.shared.leading("Q", out_features)
        return Q.to(self.c) @ self.c * self.scale, self.A0 + (P.to(self.a) @ self.a).T


@dataclass(frozen=True, kw_only=True)
class NOLA(DeltaConfig):
    """Hyper-parameters of NOLA."""

    rank: int = option(8, "rank r of the update", paper="8..16", low=1)
    count: int = option(128, "random matrices k that make up each factor", paper="128..1024", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: the rank", low=1e-6)

    kinds = LINEAR_KINDS
    delta = NOLADelta

    def shared(self, targets: Sequence[Target], seed: int) -> Bases:
        """P [in, r, k] and Q [out, r, k]: the side that targets take a part of comes first, so that taking it copies nothing."""
        generator, bound = torch.Generator().manual_seed(seed), 1 / math.sqrt(self.count)
        Q, P = (torch.empty(size, self.rank, self.count).uniform_(-bound, bound, generator=generator) for size in largest(targets))
        return Bases(False, P=P, Q=Q)

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "count": self.count, "scale": scaling(self.alpha, self.rank, 1.0)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return 2 * self.count


catalogue.register(
    Method("nola", "NOLA: Compressing LoRA using Linear Combination of Random Basis", "arXiv 2310.02556", "delta",
           "factors as weighted sums of random matrices", NOLA)
)  # fmt: skip
