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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.kernels.lora import LowRankMap
from graft.methods.deltas.lora import LoRA
from graft.methods.families import peft_lora
from graft.methods.families.factored import LowRank

if TYPE_CHECKING:
    from graft.core.adapter import Adapter

TINY = 1e-12  # keeps rows of pruned models, whose norm is zero, finite


class DoRADelta(LowRank):
    """LoRA as the direction, ``magnitude`` [out] beside it."""

    detach_norm: bool = True

    def __init__(self, target: Target, rank: int, scale: float, generator: torch.Generator, dropout: float = 0.0):
        super().__init__(target, rank, scale, generator, dropout)
        self.magnitude = nn.Parameter(target.weight().to(target.dtype).norm(dim=1))

    def norm(self) -> Tensor:
        """The row norms of V [out]."""
        B, A = self.product()
        W = self.target.weight().to(B.dtype)
        squared = W.square().sum(1) + 2 * (B * (W @ A.T)).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
        return squared.clamp(min=TINY).sqrt()

    def gain(self) -> Tensor:
        """m / n [out]."""
        if self.detach_norm:
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

    kinds: ClassVar[tuple[str, ...]] = LINEAR_KINDS
    delta: ClassVar[type[LowRank]] = DoRADelta
    peft: ClassVar[PeftFormat | None] = PeftFormat(
        "LORA", {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}, peft_lora.OPTIONS
    )

    def build(self, *args: Any) -> LowRank:
        delta = super().build(*args)
        assert isinstance(delta, DoRADelta)
        delta.detach_norm = self.detach_norm
        return delta

    def parameters(self, out_features: int, in_features: int) -> int:
        return super().parameters(out_features, in_features) + out_features

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return peft_lora.write(adapter, self.dropout, use_dora=True)


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
