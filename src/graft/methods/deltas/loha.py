"""LoHa: the entry-by-entry product of two low-rank matrices, of rank up to r^2.

    dW = s (B1 A1) o (B2 A2)        B1, B2 [out, r] and A1, A2 [r, in] trained,  s = alpha / r
    B1 ~ U(-1/sqrt(r), 1/sqrt(r)),  A1, and B2 likewise by their own widths,  A2 = 0

Hyeon-Woo et al., FedPara, arXiv 2108.06098; as an adapter: Yeh et al., LyCORIS, arXiv 2309.14859. LyCORIS starts with normal numbers, PEFT
with FedPara's uniform ones, which are followed. dW = B A with B[:, ij] = s B1[:, i] B2[:, j] and A[ij] = A1[i] A2[j]: an exact LoRA of rank
r^2. A convolution has its matrix [out, in kh kw]; FedPara's form with a core for the kernel (``use_effective_conv2d``) is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.kernels.lora import lora_linear
from graft.methods.families.additive import Additive
from graft.methods.families.factored import PLAIN, check_rank, scaling, uniform


class LoHaDelta(Additive):
    """B1 [out, r], A1 [r, in], B2 [out, r], A2 [r, in]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, (out_features, in_features), rank = self.target, self.target.shape, layout["rank"]
        check_rank(rank, target)
        self.scale = float(layout["scale"])
        sizes = (out_features, rank), (rank, in_features), (out_features, rank)
        self.B1, self.A1, self.B2 = (nn.Parameter(uniform(m, n, generator, target.dtype)) for m, n in sizes)
        self.A2 = nn.Parameter(torch.zeros(rank, in_features, dtype=target.dtype))

    def update(self) -> Tensor:
        return (self.B1 @ self.A1) * (self.B2 @ self.A2) * self.scale

    def factors(self) -> tuple[Tensor, Tensor]:
        B = (self.B1[:, :, None] * self.B2[:, None] * self.scale).flatten(1)
        return B, (self.A1[:, None] * self.A2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        target, (out_features, in_features) = self.target, self.target.shape
        # A dense dW needs a dense gradient; two thin factors do not, while r^2 is small enough for them.
        if target.kind not in PLAIN or 4 * len(self.A2) ** 2 * (out_features + in_features) > out_features * in_features:
            return super().forward(x)
        B, A = self.factors()
        return lora_linear(x, target.weight(), target.bias, A, B)


@dataclass(frozen=True, kw_only=True)
class LoHa(DeltaConfig):
    """Hyper-parameters of LoHa."""

    rank: int = option(8, "rank r of either factor; the update has rank up to r^2", paper="4..32", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: the rank", low=1e-6)

    kinds = LINEAR_KINDS
    delta = LoHaDelta
    peft = PeftFormat(
        "LOHA", {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}, {"r": "rank", "alpha": "alpha"}, alpha="alpha",
        fixed={"use_effective_conv2d": False}, unread={"rank_dropout": 0.0, "module_dropout": 0.0},
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "scale": scaling(self.alpha, self.rank, 1.0)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return 2 * self.rank * (out_features + in_features)


catalogue.register(
    Method("loha", "LoHa: Low-Rank Hadamard Product (FedPara, LyCORIS)", "arXiv 2108.06098", "delta", "product of two B A, entry by entry", LoHa)
)
