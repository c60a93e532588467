"""SVFit: trains the leading singular values of W, its singular vectors stay.

    W = U S V^T;  dW = U_r diag(d) V_r^T        d [r] trained from 0: what is added to the singular values

Sun et al., arXiv 2409.05926. The paper trains sigma = S_r + d beside a residual W - U_r S_r V_r^T; with d beside W itself nothing is rounded,
W stays whole, and weight decay pulls towards the base. ``rank`` none takes all singular values, as the paper does for RoBERTa.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.diagonal import Diagonal
from graft.methods.families.factored import check_rank
from graft.methods.families.rebuilt import Rebuilt, save_bases
from graft.numerics.svd import truncated_svd


class SVFitDelta(Rebuilt, Diagonal):
    """``d`` [r] between frozen U [out, r] and V [r, in]."""

    config: SVFit
    U: Tensor
    V: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, rank = self.target, layout["rank"]
        check_rank(rank, target)
        U, _, V = truncated_svd(target.weight().to(target.dtype), rank)
        self.freeze_factors(self.config.save_bases, U=U, V=V)
        self.d = nn.Parameter(torch.zeros(rank, dtype=target.dtype))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.U, self.d, self.V


@dataclass(frozen=True, kw_only=True)
class SVFit(DeltaConfig):
    """Hyper-parameters of SVFit."""

    rank: int | None = option(None, "singular values r that train; none: all", paper="768 (all), or 99 % of the energy", low=1)
    save_bases: bool = save_bases()

    kinds = LINEAR_KINDS
    delta = SVFitDelta

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank or min(target.shape)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank or min(out_features, in_features)


catalogue.register(
    Method("svfit", "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", "arXiv 2409.05926", "delta",
           "the singular values of W", SVFit, random=False)
)  # fmt: skip
