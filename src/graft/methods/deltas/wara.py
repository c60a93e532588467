"""WaRA: low-rank factors on the wavelet coefficients of features.

    dW = s T_out^T [g_1 B A, 0; 0, g_2 B A] T_in = [B_1 B_2] [A_1; A_2],    B_b = s g_b T_out,b^T B,  A_b = A T_in,b
    A [r, in/2], B [out/2, r], gains g [2] trained;  T the one-level wavelet transform, its low rows then its high rows (b = 1, 2)
    factors "own":  each half has its own A and B instead of a gain

Heidari et al., arXiv 2506.24092. With gains of one and the Haar wavelet dW = (B A) kron I_2: the wavelet would disappear, so the gains are
what makes it differ from a Kronecker product. The transform over tokens is left out: over images it commutes with shared factors (and is
LoRA), and in a causal model it would show a token its future. Tiny-WaRA, a core in W's singular basis, is ``lora-xs``. Odd sizes are
padded by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.bases import Transforms
from graft.methods.families.factored import Factored, check_rank, scaling, uniform
from graft.methods.families.wavelets import wavelet_transform


class WaRADelta(Factored):
    """``A`` [n, r, in/2], ``B`` [n, out/2, r] with n = 1, and ``gains`` [2]; or n = 2 pairs without gains."""

    gains: Tensor | None
    shared: Transforms

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, rank, pairs = self.target, layout["rank"], layout["pairs"]
        check_rank(rank, target)
        self.scale, (out_half, in_half) = float(layout["scale"]), map(half, target.shape)
        self.A = nn.Parameter(torch.stack([uniform(rank, in_half, generator, target.dtype) for _ in range(pairs)]))
        self.B = nn.Parameter(torch.zeros(pairs, out_half, rank, dtype=target.dtype))
        self.register_parameter("gains", nn.Parameter(torch.ones(2, dtype=target.dtype)) if pairs == 1 else None)

    def product(self) -> tuple[Tensor, Tensor]:
        T_out, T_in = (T.to(self.A).chunk(2) for T in self.shared.sides(self.target))
        A, B = self.A.expand(2, -1, -1), (self.B if self.gains is None else self.B * self.gains[:, None, None])
        return torch.cat([T_out[b].T @ B[b] for b in (0, 1)], 1) * self.scale, torch.cat([A[b] @ T_in[b] for b in (0, 1)])


def half(size: int) -> int:
    """Rows in each half of the transform."""
    return (size + 1) // 2


@dataclass(frozen=True, kw_only=True)
class WaRA(DeltaConfig):
    """Hyper-parameters of WaRA."""

    rank: int = option(8, "rank r of the factors; dW has up to twice that", paper="4..32", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: twice the rank", low=1e-6)
    wavelet: Literal["haar", "db2", "db4"] = option("haar", "the wavelet", paper="haar")
    factors: Literal["shared", "own"] = option("shared", "one pair for both halves with a gain each, or a pair each")

    kinds = LINEAR_KINDS
    delta = WaRADelta

    def shared(self, targets: Sequence[Target], seed: int) -> Transforms:
        return Transforms(targets, lambda size: wavelet_transform(2 * half(size), self.wavelet)[:, :size])

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "pairs": 1 if self.factors == "shared" else 2, "scale": scaling(self.alpha, self.rank, 2.0)}

    def parameters(self, out_features: int, in_features: int) -> int:
        pair = self.rank * (half(out_features) + half(in_features))
        return pair + 2 if self.factors == "shared" else 2 * pair


catalogue.register(Method("wara", "WaRA: Wavelet Low Rank Adaptation", "arXiv 2506.24092", "delta", "low rank on wavelet coefficients", WaRA))
