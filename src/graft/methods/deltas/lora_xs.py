"""LoRA-XS: a small square matrix between the frozen leading singular vectors of W.

    W = U S V^T;  dW = s B N A,    B = U_r [out, r],  A = S_r V_r^T [r, in] frozen,  N [r, r] trained from 0,  s = alpha / r

Banaei et al., arXiv 2405.17604. The singular values sit on A's side, as in the authors' code. It draws N from N(0, 1e-10), which moves the
function a little; N = 0 trains as well, since neither B nor A is zero, and starts exactly at the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.target import Target
from graft.methods.families.rebuilt import save_bases
from graft.methods.families.three_factor import ThreeFactorConfig
from graft.numerics.svd import truncated_svd


@dataclass(frozen=True, kw_only=True)
class LoRAXS(ThreeFactorConfig):
    """Hyper-parameters of LoRA-XS."""

    rank: int = option(32, "rank r of the update", paper="4..64", low=1)
    save_bases: bool = save_bases()

    trained = "N"

    @property
    def saves_frozen(self) -> bool:
        return self.save_bases

    def start(self, target: Target, rank: int, generator: torch.Generator) -> Sequence[Tensor]:
        U, S, Vh = truncated_svd(target.weight().to(target.dtype), rank)
        return U, torch.zeros(rank, rank), S[:, None] * Vh


catalogue.register(
    Method("lora-xs", "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", "arXiv 2405.17604", "delta",
           "a core between W's singular vectors", LoRAXS, random=False)
)  # fmt: skip
