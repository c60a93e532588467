"""GraLoRA: W in k x k blocks, each with a low-rank pair of its own.

    dW[j, i] = s sum_t B[j][i r/k + t]^T A[i][:, j r/k + t]^T        block (j, i) [out / k, in / k], t < r / k
    A [k, in / k, r], B [k, r, out / k] trained,  s = alpha / (r + h);  hybrid: + s B_h A_h of rank h over the whole matrix
    A ~ U(-1/sqrt(in / k), 1/sqrt(in / k)), A_h ~ U(-1/sqrt(in), 1/sqrt(in)), B = B_h = 0

Jung et al., arXiv 2505.20355. As many parameters as LoRA of rank r + h, an update of rank up to k r + h. It runs as the LoRA of that rank whose
factors are zero outside of the blocks: ``A`` block-diagonal, ``B`` as the blocks' inputs are exchanged. PEFT wants k to divide every target's
sides; a file with a target where k had to be smaller is refused by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat, most_and_others
from graft.core.target import Target
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import PLAIN, Factored, check_rank, scaling, uniform
from graft.numerics.orthogonal import block_diagonal

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class GraLoRADelta(Factored):
    """A [k, in / k, r] and B [k, r, out / k]; with a hybrid rank h also A_h [h, in] and B_h [out, h]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, (out_features, in_features) = self.target, self.target.shape
        self.scale, k, rank, hybrid = float(layout["scale"]), layout["blocks"], layout["rank"], layout["hybrid_rank"]
        check_rank(rank, target)
        start = [uniform(rank, in_features // k, generator, target.dtype).T for _ in range(k)]
        self.A, self.B = nn.Parameter(torch.stack(start)), nn.Parameter(torch.zeros(k, rank, out_features // k, dtype=target.dtype))
        self.hybrid = bool(hybrid)
        if hybrid:
            check_rank(hybrid, target, "hybrid_rank")
            self.A_h = nn.Parameter(uniform(hybrid, in_features, generator, target.dtype))
            self.B_h = nn.Parameter(torch.zeros(out_features, hybrid, dtype=target.dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        k, rank, width = self.B.shape
        A = block_diagonal(self.A.mT)  # row (i, j, t)
        ranks = self.B.reshape(k, k, rank // k, width) * self.scale
        B = torch.einsum("jito,jl->joilt", ranks, torch.eye(k).to(ranks)).reshape(k * width, k * rank)  # column (i, l, t), zero but for l = j
        if not self.hybrid:
            return B, A
        return torch.cat([B, self.B_h * self.scale], 1), torch.cat([A, self.A_h])


@dataclass(frozen=True, kw_only=True)
class GraLoRA(DeltaConfig):
    """Hyper-parameters of GraLoRA."""

    rank: int = option(32, "rank r of the blocks of one row together", paper="16..128", low=1)
    blocks: int = option(
        2, "blocks k along each side; the largest k up to this that divides out, in and rank", paper="2 (r <= 32), 4 (r >= 64)", low=1
    )
    hybrid_rank: int = option(0, "rank h of a LoRA over the whole matrix beside the blocks", low=0)
    alpha: float | None = option(None, "numerator of the scale alpha / (r + h); none: twice r + h", paper="2 r", low=1e-6)

    kinds = PLAIN
    delta = GraLoRADelta
    peft = PeftFormat(
        "GRALORA", {"A": "gralora_A", "B": "gralora_B", "A_h": "gralora_A_general.weight", "B_h": "gralora_B_general.weight"},
        {"r": "rank", "hybrid_r": "hybrid_rank", "gralora_k": "blocks", "alpha": "alpha"}, {"blocks": ("gralora_A", 0)},
        unread={"gralora_dropout": 0.0},
    )  # fmt: skip

    def fitting(self, out_features: int, in_features: int) -> int:
        """The number of blocks along each side of this shape."""
        return largest_divisor(math.gcd(out_features, in_features, self.rank), self.blocks)

    def layout_at(self, target: Target) -> Layout:
        scale = scaling(self.alpha, self.rank + self.hybrid_rank, 2.0)
        return {"rank": self.rank, "hybrid_rank": self.hybrid_rank, "scale": scale, "blocks": self.fitting(*target.shape)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return (self.rank + self.hybrid_rank) * (out_features + in_features)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        k, _ = most_and_others({name: layout["blocks"] for name, layout in adapter.layouts.items()})
        scale, _ = most_and_others({name: layout["scale"] for name, layout in adapter.layouts.items()})
        return {**super().to_peft(adapter), "gralora_k": k, "alpha": scale * (self.rank + self.hybrid_rank)}


catalogue.register(
    Method("gralora", "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", "arXiv 2505.20355", "delta",
           "a low-rank pair for every block of W", GraLoRA)
)  # fmt: skip
