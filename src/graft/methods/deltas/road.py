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
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import PLAIN


class RoAdDelta(Delta):
    """``theta`` and ``alpha`` [n out / 2], n = 1, 2 or 4 for a pair."""

    config: RoAd

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.group, self.each = layout["group"], EACH[self.config.variant]
        size = self.each * (self.target.shape[0] // 2)
        self.theta = nn.Parameter(torch.zeros(size, dtype=self.target.dtype))
        self.alpha = nn.Parameter(torch.ones(size, dtype=self.target.dtype))

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

    kinds = LINEAR_KINDS
    delta = RoAdDelta
    peft = PeftFormat("ROAD", {"theta": "road_theta", "alpha": "road_alpha"}, {"variant": "variant", "group_size": "group"})

    def layout_at(self, target: Target) -> Layout:
        if target.shape[0] < 2:
            raise GraftError(f"{target} has one output, and a rotation takes two; narrow the targets.")
        return {"group": 2 * largest_divisor(target.shape[0] // 2, self.group // 2)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return 2 * EACH[self.variant] * (out_features // 2)

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        return {"group": self.group}


catalogue.register(
    Method("road", "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", "arXiv 2409.00119", "delta",
           "rotations of pairs of outputs", RoAd, random=False)
)  # fmt: skip
