"""LoRA: a low-rank update beside the frozen weight; with rsLoRA's scale and LoRA+'s learning rates.

    W' = W + s B A        W [out, in] frozen, A [r, in] and B [out, r] trained
    s = alpha / r         (LoRA);  s = alpha / sqrt(r)  (rsLoRA, ``rslora=True``)
    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0             (embeddings: A = 0, B ~ N(0, 1))
    lr_B = lr_ratio * lr_A                            (LoRA+)

Hu et al., arXiv 2106.09685; rsLoRA: Kalajdzievski, arXiv 2312.03732; LoRA+: Hayou et al., arXiv 2402.12354.
Paper and code of LoRA+ agree; vectors and heads learn at lr_B, as in its code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.target import Target
from graft.methods.families import peft_lora
from graft.methods.families.factored import LowRank
from graft.methods.families.groups import apart

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


@dataclass(frozen=True, kw_only=True)
class LoRA(DeltaConfig):
    """Hyper-parameters of LoRA."""

    rank: int = option(8, "rank r of the update", paper="1..64", low=1)
    alpha: float | None = option(None, "numerator of the scale; none: twice the rank", paper="r..2r", low=1e-6)
    rslora: bool = option(False, "divide alpha by sqrt(r) instead of r", paper="rsLoRA")
    dropout: float = option(0.0, "chance of dropping an input of the branch while training", paper="0..0.1", low=0, high=0.99)
    lr_ratio: float = option(1.0, "learning rate of B over that of A", paper="LoRA+: 2..32, about 16", low=0)

    delta: ClassVar[type[Delta]] = LowRank
    peft = peft_lora.FORMAT

    @property
    def scale(self) -> float:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "scale": self.scale, "frozen": 0, "inactive": []}

    def groups(self, adapter: Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        if self.lr_ratio == 1:
            return super().groups(adapter, lr, weight_decay)
        slow = {id(pair.A) for pair in adapter.pairs().values()}
        return apart(super().groups(adapter, lr, weight_decay), (p for p in adapter.parameters() if id(p) not in slow), lr=lr * self.lr_ratio)

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        return cls.parse(peft_lora.read(config)) if bool(config.get("use_dora")) == (cls is not LoRA) else None

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        return peft_lora.layout(target.name, config, shapes)


catalogue.register(Method("lora", "LoRA: Low-Rank Adaptation of Large Language Models", "arXiv 2106.09685", "delta", "low-rank update B A", LoRA))
