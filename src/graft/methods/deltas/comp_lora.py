"""Comp-LoRA: LoRA that leaves the leading singular directions of W alone.

    W = U S V^T;  dW = s (I - U_k U_k^T) B A (I - V_k V_k^T)        A [r, in], B [out, r] as in LoRA, s = alpha / r
    k: the fewest directions that hold the share ``energy`` of sum S^2, at most min(out, in) - r

Zhang et al., arXiv 2501.15040. No code is public: that both sides are projected, and the rule for k, are inferred from the abstract.
The projection is part of the delta, so the gradient is projected too and neither Adam nor weight decay leaves the complement. Files hold
the projected factors, an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.deltas.lora import LoRA
from graft.methods.families.factored import LowRank
from graft.numerics.svd import truncated_svd


class CompLoRADelta(LowRank):
    """LoRA's A and B, and the protected directions ``U`` [out, k] and ``V`` [k, in]; of no rows where a side is not protected."""

    not_saved = frozenset({"U", "V"})
    config: CompLoRA
    U: Tensor
    V: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        super().make(layout, generator)
        U, S, V = truncated_svd(self.target.weight().to(self.target.dtype), min(self.target.shape))
        count, energy, side = layout["protected"], self.config.energy, self.config.side
        if count is None:
            held = S.square().cumsum(0)
            count = min(int((held < energy * held[-1]).sum()) + (energy > 0), len(S) - self.rank)
        self.register_buffer("U", U[:, : count if side != "right" else 0].clone())
        self.register_buffer("V", V[: count if side != "left" else 0].clone())

    def acting(self) -> tuple[Tensor, Tensor]:
        B: Tensor = self.B
        A: Tensor = self.A
        for _ in range(2):  # where most of a factor is taken off, once leaves the rounding of what was
            B, A = B - self.U @ (self.U.T @ B), A - (A @ self.V.T) @ self.V
        return B, A

    @property
    def layout(self) -> Layout:
        return {**super().layout, "protected": max(self.U.shape[1], len(self.V))}


@dataclass(frozen=True, kw_only=True)
class CompLoRA(LoRA):
    """Hyper-parameters of Comp-LoRA: LoRA's and two of its own."""

    energy: float = option(0.9, "share of the squared singular values whose directions are protected", low=0, high=1)
    side: Literal["both", "left", "right"] = option("both", "protected directions: of outputs (left), inputs (right) or both")

    kinds = LINEAR_KINDS
    delta = CompLoRADelta

    def layout_at(self, target: Target) -> Layout:
        return {**super().layout_at(target), "protected": None}  # as many as hold the energy; make() looks at W once for both

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """None: such a file is a plain LoRA."""


catalogue.register(
    Method("comp-lora", "Complementary Subspace Low-Rank Adaptation of Vision-Language Models for Few-Shot Classification", "arXiv 2501.15040",
           "delta", "LoRA beside W's main directions", CompLoRA)
)  # fmt: skip
