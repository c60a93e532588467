"""Block-LoRA: LoRA in n blocks whose down-projections are one.

    along the rank (default):  dW = s (B_1 + ... + B_n) A,    A [r/n, in], B_i [out, r/n]
    along the input:           dW = s B [A ... A],            A [r, in/n], B [out, r]
    s = alpha / r,  A ~ U(-1/sqrt(columns), 1/sqrt(columns)),  B = 0

Zhou et al., arXiv 2501.16720. No code is public and the axis of the blocks is inferred from the abstract, so both readings are here.
Along the rank all B_i get the same gradient: the function class is that of LoRA with rank r/n, whose B moves n times as far a step;
compare with that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import Factored, check_rank, scaling, uniform


class BlockLoRADelta(Factored):
    """``A`` [q, in / copies] and ``B`` [n, out, q]: n arms, or one arm on the sum of input pieces."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, (out_features, in_features), arms, rank = self.target, self.target.shape, layout["arms"], layout["rank"]
        check_rank(rank, target)
        self.scale, self.copies = float(layout["scale"]), layout["copies"]
        self.A = nn.Parameter(uniform(rank, in_features // self.copies, generator, target.dtype))
        self.B = nn.Parameter(torch.zeros(arms, out_features, rank, dtype=target.dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        return self.B.sum(0) * self.scale, self.A.repeat(1, self.copies)


@dataclass(frozen=True, kw_only=True)
class BlockLoRA(DeltaConfig):
    """Hyper-parameters of Block-LoRA."""

    rank: int = option(8, "nominal rank r", paper="2", low=1)
    blocks: int = option(2, "blocks n; along the input the largest number up to it that divides the inputs", paper="2..8", low=1)
    along: Literal["rank", "input"] = option("rank", "what is split into blocks")
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: twice the rank", paper="r/2", low=1e-6)

    kinds = LINEAR_KINDS
    delta = BlockLoRADelta

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.along == "rank" and self.rank % self.blocks:
            raise GraftError(f"BlockLoRA.rank is {self.rank}, which {self.blocks} blocks do not divide; choose a multiple of blocks.")

    def split(self, in_features: int) -> tuple[int, int, int]:
        """``(rank, arms, copies)`` of a delta with so many inputs."""
        if self.along == "rank":
            return self.rank // self.blocks, self.blocks, 1
        return self.rank, 1, largest_divisor(in_features, self.blocks)

    def layout_at(self, target: Target) -> Layout:
        rank, arms, copies = self.split(target.shape[1])
        return {"rank": rank, "arms": arms, "copies": copies, "scale": scaling(self.alpha, self.rank, 2.0)}

    def parameters(self, out_features: int, in_features: int) -> int:
        rank, arms, copies = self.split(in_features)
        return rank * (in_features // copies + arms * out_features)


catalogue.register(
    Method("block-lora", "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot Learning", "arXiv 2501.16720",
           "delta", "several up-projections on one down-projection", BlockLoRA)
)  # fmt: skip
