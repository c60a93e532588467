"""Hydra: a parallel low-rank head on the input and a sequential one on the output of a linear map.

    h = x W^T + b
    y = h + s x A^T B^T + s_o h C^T D^T
    W' = W + s B A + s_o D C W,   b' = b + s_o D C b
    A [r, in], B [out, r]; C [r_o, out], D [out, r_o]; B = D = 0 at the start

Kim et al., arXiv 2309.06922. No activation between the factors. The vision code merges attention with the wrong weights and
untransposed factors; the closed form above is followed. Heads without biases, as in the language code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout, Pair
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import check_rank, uniform


class HydraDelta(Delta):
    """A, B: the parallel head (LoRA). C, D: the sequential head."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, (out_features, in_features) = self.target, self.target.shape
        self.scale, self.output_scale = layout["scale"], layout["output_scale"]
        for name in ("rank", "output_rank"):
            check_rank(layout[name], target, name)
        self.A = nn.Parameter(uniform(layout["rank"], in_features, generator, target.dtype))
        self.B = nn.Parameter(torch.zeros(out_features, layout["rank"], dtype=target.dtype))
        self.C = nn.Parameter(uniform(layout["output_rank"], out_features, generator, target.dtype))
        self.D = nn.Parameter(torch.zeros(out_features, layout["output_rank"], dtype=target.dtype))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        W, b = self.target.weight().to(self.A.dtype), self.target.bias
        B, D = self.B * self.scale, self.D * self.output_scale
        return W + B @ self.A + D @ (self.C @ W), None if b is None else b + D @ (self.C @ b.to(D.dtype))

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        if not target.pointwise:
            return super().forward(x)
        h = target.apply(x, target.weight(), target.bias)
        parallel = target.mix(target.apply(x, self.A), self.B * self.scale)
        return h + parallel + target.mix(target.mix(h, self.C), self.D * self.output_scale)

    def pair(self) -> Pair:
        return Pair(self.A, self.B, self.scale)


@dataclass(frozen=True, kw_only=True)
class Hydra(DeltaConfig):
    """Hyper-parameters of Hydra."""

    rank: int = option(4, "rank r of the parallel head", paper="2..4", low=1)
    output_rank: int = option(8, "rank r_o of the sequential head", paper="2..8", low=1)
    scale: float = option(1.0, "scale s of the parallel head", paper="1")
    output_scale: float = option(1.0, "scale s_o of the sequential head", paper="1")

    kinds = LINEAR_KINDS
    delta = HydraDelta

    def layout_at(self, target: Target) -> Layout:
        return self.settings()

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features) + 2 * self.output_rank * out_features


catalogue.register(
    Method("hydra", "Hydra: Multi-head Low-rank Adaptation", "arXiv 2309.06922", "delta", "low-rank heads on the input and on the output", Hydra)
)
