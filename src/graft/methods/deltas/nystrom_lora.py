"""NyströmLoRA: SLoRA that starts at a Nyström sketch of W, blocks of W instead of a singular value decomposition.

    dW = s (B N A - B0 N0 A0),    B0 = W[:, :r],  A0 = W[:r, :],  P = W[:r, :r]
    core "raw":   N0 = P          (the authors' code)
    core "pinv":  N0 = P^+        (the Nyström formula: W[:, :r] P^+ W[:r, :] = W where rank W = rank P = r)

Guo et al., NLoRA, arXiv 2502.14482. The authors' code neither inverts P nor takes the start off W, so its model begins at W + s B0 P A0,
a perturbation that is cubic in W; here the start is always subtracted, and the function begins as the base's. The pseudo-inverse drops
singular values below ``cutoff`` times the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.target import Target
from graft.methods.deltas.slora import SLoRA
from graft.methods.families.rebuilt import save_bases


@dataclass(frozen=True, kw_only=True)
class NystromLoRA(SLoRA):
    """Hyper-parameters of NyströmLoRA."""

    core: Literal["raw", "pinv"] = option("raw", "the core that N starts at: the corner block of W, or its pseudo-inverse", paper="raw")
    cutoff: float = option(1e-2, "with pinv: singular values of the corner below this share of the largest count as zero", low=0, high=1)
    save_bases: bool = save_bases()

    subtracted = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.core == "raw":
            self.refuse_unused("core = 'raw' inverts nothing", "cutoff")

    @property
    def saves_frozen(self) -> bool:
        return self.save_bases

    def start(self, target: Target, rank: int, generator: torch.Generator) -> Sequence[Tensor]:
        W = target.weight().to(target.dtype)
        corner = W[:rank, :rank]
        return W[:, :rank], corner if self.core == "raw" else torch.linalg.pinv(corner, rtol=self.cutoff), W[:rank]


catalogue.register(
    Method("nystrom-lora", "NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models", "arXiv 2502.14482", "delta",
           "B N A from blocks of W", NystromLoRA, random=False)
)  # fmt: skip
