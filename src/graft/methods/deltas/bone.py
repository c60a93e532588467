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
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout, PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.additive import Additive
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.peft_options import refuse_others

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class BoneDelta(Additive):
    """``D`` [blocks, r, r]."""

    def __init__(self, target: Target, block: int, row: bool):
        super().__init__(target)
        self.row = row
        self.D = nn.Parameter(torch.zeros(target.shape[row] // block, block, block, dtype=target.dtype))

    @property
    def layout(self) -> Layout:
        return {"block": self.D.shape[1], "row": self.row}

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

    kinds: ClassVar[tuple[str, ...]] = LINEAR_KINDS
    peft: ClassVar[PeftFormat | None] = PeftFormat("MISS", {"D": "miss_block"}, ("mini_r", "miss_dropout"))

    def peft_format(self) -> PeftFormat | None:
        return self.peft if self.share == "col" else None

    def layout_at(self, target: Target) -> Layout:
        return {"block": largest_divisor(math.gcd(*target.shape), self.block), "row": self.share == "row"}

    def build(self, target: Target, layout: Layout, shared: nn.Module | None, generator: torch.Generator) -> BoneDelta:
        return BoneDelta(target, layout["block"], layout["row"])

    def parameters(self, out_features: int, in_features: int) -> int:
        side = out_features if self.share == "col" else in_features
        return side * largest_divisor(math.gcd(out_features, in_features), self.block)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {"r": self.block, "mini_r": 1, "init_weights": "bat", "miss_dropout": 0.0, "bias": "none"}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[Self, dict[str, Layout]] | None:
        if config["init_weights"] != "bat":
            return None
        refuse_others(config, bias="none")  # its dropout is not used with "bat"
        own = cls(block=config["r"])
        return own, {name: {"block": own.block, "row": False} for name in shapes}


catalogue.register(
    Method("bone", "Bone: Block Affine Transformation as PEFT for LLMs", "arXiv 2409.15371", "delta", "blocks that W itself guides", Bone,
           random=False)
)  # fmt: skip
