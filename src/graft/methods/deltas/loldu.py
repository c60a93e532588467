"""LoLDU: trains the leading entries of D in the pivoted decomposition W = P L D U.

    dW = s (P L)_r diag(d) U_r       (P L)_r [out, r], U_r [r, in] frozen, d [r] trained from 0: what is added to D
    L unit lower, U unit upper triangular, P the permutation of partial pivoting

Shi et al., arXiv 2410.13618. The authors train z = D_r + d beside a residual W - s (P L)_r D_r U_r; with d beside W itself W stays whole. Their code
takes the first r pivots; ``pick`` largest takes those of the largest size. Their other starts of z change the function before training
(they subtract D and add z), and are left out. Rows of U that belong to vanishing pivots are kept finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.diagonal import Diagonal
from graft.methods.families.factored import check_rank
from graft.methods.families.rebuilt import Rebuilt, save_bases
from graft.numerics.lu import ldu


class LoLDUDelta(Rebuilt, Diagonal):
    """``d`` [r] between frozen L [out, r] and U [r, in]."""

    config: LoLDU
    L: Tensor
    U: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, target, rank = float(layout["scale"]), self.target, layout["rank"]
        check_rank(rank, target)
        L, D, U = ldu(target.weight().to(target.dtype))
        order = D.abs().argsort(descending=True, stable=True) if self.config.pick == "largest" else torch.arange(len(D), device=D.device)
        self.freeze_factors(self.config.save_bases, L=L[:, order[:rank]], U=U[order[:rank]])
        self.d = nn.Parameter(torch.zeros(rank, dtype=target.dtype))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.L, self.d * self.scale, self.U


@dataclass(frozen=True, kw_only=True)
class LoLDU(DeltaConfig):
    """Hyper-parameters of LoLDU."""

    rank: int | None = option(None, "pivots r that train; none: all", paper="768 (all)", low=1)
    scale: float = option(1.0, "scale s of the update", paper="alpha / r, which only rescales the learning rate")
    pick: Literal["first", "largest"] = option("first", "which pivots train", paper="first")
    save_bases: bool = save_bases()

    kinds = LINEAR_KINDS
    delta = LoLDUDelta

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank or min(target.shape), "scale": self.scale}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank or min(out_features, in_features)


catalogue.register(
    Method("loldu", "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition", "arXiv 2410.13618", "delta",
           "the diagonal of W's LDU decomposition", LoLDU, random=False)
)  # fmt: skip
