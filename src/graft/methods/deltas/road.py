"""RoAd: turns and stretches the outputs of a map in pairs.

    [y_i, y_j] = [[a_i cos t_i, -a_i sin t_i], [a_j sin t_j, a_j cos t_j]] [h_i, h_j],    h = W x + b,  so W' = R W and b' = R b
    j = i + group / 2 within groups of neighbouring outputs;  t = 0, a = 1 at the start
    road_1: one t and a for each pair (a rotation);  road_2: one for each output;  road_4: one for each entry of the matrices

Liao and Monz, arXiv 2409.00119. Where the group does not divide the outputs, the largest even size below it does, and the last of an odd
number of outputs stays as it is; PEFT refuses both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout, PeftFormat
from graft.core.errors import GraftError
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import PLAIN

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class RoAdDelta(Delta):
    """``theta`` and ``alpha`` [n out / 2], n = 1, 2 or 4 for a pair."""

    def __init__(self, target: Target, group: int, each: int):
        super().__init__(target)
        self.group, self.each = group, each
        size = each * (target.shape[0] // 2)
        self.theta = nn.Parameter(torch.zeros(size, dtype=target.dtype))
        self.alpha = nn.Parameter(torch.ones(size, dtype=target.dtype))

    @property
    def layout(self) -> Layout:
        return {"group": self.group}

    def columns(self) -> tuple[Tensor, Tensor]:
        """What an output, and what its partner is multiplied by, in PEFT's order of the parameters."""
        if self.each == 4:
            (t1, t2), (a1, a2) = (p.view(-1, 2, self.group).unbind(1) for p in (self.theta, self.alpha))
            return (a1 * t1.cos()).flatten(), (a2 * t2.sin()).flatten()
        columns = self.alpha * self.theta.cos(), self.alpha * self.theta.sin()
        if self.each == 2:
            return columns
        own, partner = (c.view(-1, 1, self.group // 2).expand(-1, 2, -1).flatten() for c in columns)
        return own, partner

    def turn(self, h: Tensor) -> Tensor:
        """``R h`` for ``h [..., out]``."""
        own, partner = self.columns()
        pairs, rest = h[..., : len(own)], h[..., len(own) :]
        first, second = pairs.reshape(*h.shape[:-1], -1, 2, self.group // 2).unbind(-2)
        turned = pairs * own + torch.stack([-second, first], -2).reshape(pairs.shape) * partner
        return torch.cat([turned, rest.to(turned.dtype)], -1) if rest.shape[-1] else turned

    def weight(self) -> tuple[Tensor, Tensor | None]:
        bias = self.target.bias
        return self.turn(self.target.weight().to(self.theta.dtype).T).T, None if bias is None else self.turn(bias)

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        if target.kind not in PLAIN:
            return super().forward(x)
        h = target.apply(x, target.weight(), target.bias)
        return self.turn(h).to(h.dtype)


EACH = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True, kw_only=True)
class RoAd(DeltaConfig):
    """Hyper-parameters of RoAd."""

    variant: Literal["road_1", "road_2", "road_4"] = option("road_1", "angles and lengths for each pair: 1, 2 or 4")
    group: int = option(64, "outputs of a group; at each target the largest even size up to it that divides them", low=2)

    kinds: ClassVar[tuple[str, ...]] = LINEAR_KINDS
    peft: ClassVar[PeftFormat | None] = PeftFormat("ROAD", {"theta": "road_theta", "alpha": "road_alpha"}, ("variant", "group_size"))

    def layout_at(self, target: Target) -> Layout:
        if target.shape[0] < 2:
            raise GraftError(f"{target} has one output, and a rotation takes two; narrow the targets.")
        return {"group": 2 * largest_divisor(target.shape[0] // 2, self.group // 2)}

    def build(self, target: Target, layout: Layout, shared: nn.Module | None, generator: torch.Generator) -> RoAdDelta:
        return RoAdDelta(target, layout["group"], EACH[self.variant])

    def parameters(self, out_features: int, in_features: int) -> int:
        return 2 * EACH[self.variant] * (out_features // 2)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {"variant": self.variant, "group_size": self.group}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[Self, dict[str, Layout]]:
        return cls(variant=config["variant"], group=config["group_size"]), {name: {"group": config["group_size"]} for name in shapes}


catalogue.register(
    Method("road", "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", "arXiv 2409.00119", "delta",
           "rotations of pairs of outputs", RoAd, random=False)
)  # fmt: skip
