"""Bone: every block of W times a trained block, plus that block, shared along a row or a column of blocks.

    W in blocks W_ab [r, r], a = 1..out/r, b = 1..in/r:    dW_ab = W_ab D_s + D_s,    D_s = 0 at the start
    share "col": s = a, D [out/r, r, r], one block for all b (PEFT's "bat");  share "row": s = b, D [in/r, r, r]

Kang, Block Affine Transformation, arXiv 2409.15371, first version; what the later versions and PEFT call MiSS leaves W out (:mod:`miss`).
No scale and no unmerging by an inverse of I + D, as in the code: the base is kept. PEFT has "col" only, and only where r divides both sides
of every target; it refuses the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.additive import Additive
from graft.methods.families.blocks import largest_divisor


class BoneDelta(Additive):
    """``D`` [blocks, r, r]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        block, self.row = layout["block"], layout["row"]
        self.D = nn.Parameter(torch.zeros(self.target.shape[self.row] // block, block, block, dtype=self.target.dtype))

    def update(self) -> Tensor:
        block, (out_features, in_features) = self.D.shape[1], self.target.shape
        blocks = self.target.weight().to(self.D.dtype).reshape(out_features // block, block, in_features // block, block).transpose(1, 2)
        D = self.D if self.row else self.D[:, None]
        return (blocks @ D + D).transpose(1, 2).reshape(out_features, in_features)


@dataclass(frozen=True, kw_only=True)
class Bone(DeltaConfig):
    """Hyper-parameters of Bone."""

    block: int = option(64, "size r of the blocks; at each target the largest that divides both of its sides", paper="64", low=1)
    share: Literal["col", "row"] = option("col", "blocks that have one D: all inputs of some outputs, or all outputs of some inputs")

    kinds = LINEAR_KINDS
    delta = BoneDelta
    peft = PeftFormat(
        "MISS", {"D": "miss_block"}, {"r": "block"}, {"block": ("miss_block", 1)}, fixed={"bias": "none", "init_weights": "bat"},
        unread={"mini_r": 1, "miss_dropout": 0.0},
    )  # fmt: skip

    def peft_format(self) -> PeftFormat | None:
        return self.peft if self.share == "col" else None

    def layout_at(self, target: Target) -> Layout:
        return {"block": largest_divisor(math.gcd(*target.shape), self.block), "row": self.share == "row"}

    def parameters(self, out_features: int, in_features: int) -> int:
        side = out_features if self.share == "col" else in_features
        return side * largest_divisor(math.gcd(out_features, in_features), self.block)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        return super().from_peft(config, shapes) if config["init_weights"] == "bat" else None


catalogue.register(
    Method("bone", "Bone: Block Affine Transformation as PEFT for LLMs", "arXiv 2409.15371", "delta", "blocks that W itself guides", Bone,
           random=False)
)  # fmt: skip
