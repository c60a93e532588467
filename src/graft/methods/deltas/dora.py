"""DoRA: weight-decomposed low-rank adaptation, a magnitude for each output times a unit direction.

    V = W + s B A [out, in];  n = ||V||_2 over each row [out], held constant in the backward pass;  m [out] trained
    W' = diag(m / n) V,  m = ||W|| at the start
    y = (m / n) (x W^T + s x A^T B^T) + b

Liu et al., arXiv 2402.09353. The paper writes a column norm with m in R^{1 x k}; all public code takes the norm of each output
row, as here. The row norms follow from thin products, without forming B A:
    n^2 = ||W||^2 + 2 s B . (W A^T) + s^2 (B (A A^T)) . B    summed over ranks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Layout
from graft.core.target import LINEAR_KINDS
from graft.kernels.lora import LowRankMap
from graft.methods.deltas.lora import LoRA
from graft.methods.families import peft_lora
from graft.methods.families.factored import LowRank

if TYPE_CHECKING:
    pass

TINY = 1e-12  # keeps rows of pruned models, whose norm is zero, finite


class DoRADelta(LowRank):
    """LoRA as the direction, ``magnitude`` [out] beside it."""

    config: DoRA

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        super().make(layout, generator)
        self.magnitude = nn.Parameter(self.target.weight().to(self.target.dtype).norm(dim=1))

    def norm(self) -> Tensor:
        """The row norms of V [out]."""
        B, A = self.product()
        W = self.target.weight().to(B.dtype)
        squared = W.square().sum(1) + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
        return squared.clamp(min=TINY).sqrt()

    def gain(self) -> Tensor:
        """m / n [out]."""
        if self.config.detach_norm:
            with torch.no_grad():
                norm = self.norm()
        else:
            norm = self.norm()
        return self.magnitude / norm

    def factors(self) -> None:
        """dW rescales the rows of W as well, so it is not of low rank."""

    def weight(self) -> tuple[Tensor, Tensor | None]:
        V, bias = super().weight()
        return self.gain()[:, None] * V, bias

    def map(self) -> LowRankMap:
        return super().map()._replace(bias=None)

    def finish(self, y: Tensor) -> Tensor:
        channels = (-1, 1, 1) if self.target.kind == "conv2d" else (-1,)
        y = self.target.scale(y, self.gain())
        return y if self.target.bias is None else y + self.target.bias.to(y.dtype).view(channels)

    def exported(self) -> dict[str, Tensor]:
        magnitude = self.magnitude.detach()
        return {**super().exported(), "magnitude": magnitude[None, :, None, None] if self.target.kind == "conv2d" else magnitude}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        super().restore({**exported, "magnitude": exported["magnitude"].flatten()})


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Hyper-parameters of DoRA: LoRA's and one of its own."""

    detach_norm: bool = option(True, "treat the norm as a constant in the backward pass", paper="true")

    kinds = LINEAR_KINDS
    delta = DoRADelta
    peft = replace(
        peft_lora.FORMAT,
        keys={**peft_lora.FORMAT.keys, "magnitude": "lora_magnitude_vector"},
        unread={**peft_lora.FORMAT.unread, "use_dora": True},
    )

    def parameters(self, out_features: int, in_features: int) -> int:
        return super().parameters(out_features, in_features) + out_features


catalogue.register(
    Method(
        "dora",
        "DoRA: Weight-Decomposed Low-Rank Adaptation",
        "arXiv 2402.09353",
        "delta",
        "magnitude times unit direction, the direction by LoRA",
        DoRA,
    )
)
