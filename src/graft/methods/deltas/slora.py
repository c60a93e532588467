"""SLoRA: LoRA with a trained square matrix between its factors.

    dW = s B N A        B [out, r], N [r, r], A [r, in] all trained,  s = alpha / r
    A ~ U(-1/sqrt(in), 1/sqrt(in)),  N ~ U(-1/sqrt(r), 1/sqrt(r)),  B = 0

Guo et al., NLoRA, arXiv 2502.14482 (its first part; :mod:`nystrom_lora` and :mod:`int_tune` are the others). With N = I it is LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.core.catalogue import Method, catalogue
from graft.core.target import Target
from graft.methods.families.factored import uniform
from graft.methods.families.three_factor import ThreeFactorConfig


@dataclass(frozen=True, kw_only=True)
class SLoRA(ThreeFactorConfig):
    """Hyper-parameters of SLoRA."""

    def start(self, target: Target, rank: int, generator: torch.Generator) -> Sequence[Tensor]:
        A, N = (uniform(rank, width, generator, target.dtype) for width in (target.shape[1], rank))
        return torch.zeros(target.shape[0], rank), N, A


catalogue.register(
    Method("slora", "SLoRA: Structured Low-Rank Adaptation (NLoRA)", "arXiv 2502.14482", "delta", "a trained core between the factors", SLoRA)
)
