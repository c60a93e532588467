"""LoRA-GA: starts A and B at singular directions of the full gradient, so that the first step follows full fine-tuning.

    G [out, in] = mean over batches of dL/dW = U S V^T
    A0 = z V[:, :r]^T,  B0 = z U[:, r:2r]       (direction "ArB2r"; any two disjoint halves of the top 2r will do)
    z = out^(1/4) / sqrt(gamma)                 (scale "stable", for both factors)
    dW = s (B A - B0 A0) = 0 at the start

Wang et al., arXiv 2407.05000. The authors' code subtracts s B0 A0 from the weight; here it is subtracted inside the delta, so the
saved adapter means "against the original W" at twice the rank. PEFT differs (it multiplies B0 by the singular values and scales B
only); the authors are followed. Only singular vectors are used, so the loss's scale does not matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Init
from graft.core.errors import GraftError
from graft.methods.families.factored import low_rank_deltas
from graft.numerics.svd import truncated_svd

if TYPE_CHECKING:
    from graft.core.adapter import Adapter
    from graft.core.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class LoRAGA(Init):
    """Hyper-parameters of LoRA-GA."""

    gamma: float = option(64.0, "the larger, the smaller the start", paper="16..64", low=1e-6)
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = option("ArB2r", "which halves of the top 2r directions A and B take")
    start_scale: Literal["stable", "unit", "gd", "weightS"] = option("stable", "size of the start")
    clip: bool = option(False, "shrink a start whose largest entry exceeds the weight's")

    def prepare(self, adapter: Adapter, calibration: Calibration | None) -> None:
        deltas = {delta.target: delta for delta in low_rank_deltas(adapter, "LoRA-GA").values()}
        if calibration is None:
            raise GraftError("LoRA-GA looks at gradients; pass calibration=a few batches with labels.")
        for target, gradient in calibration.gradients(list(deltas)):
            delta = deltas[target]
            rank = delta.rank
            if 2 * rank > min(target.shape):
                raise GraftError(
                    f"LoRA-GA needs 2 * rank directions, but {target.name} is {target.shape[0]} x {target.shape[1]}; "
                    f"choose rank {min(target.shape) // 2} or less."
                )
            U, _, Vh = truncated_svd(gradient, 2 * rank, seed=adapter.seed)
            for_A, for_B = self.halves(rank, torch.Generator().manual_seed(adapter.seed))
            size = self.size(target.weight(), rank, delta.scale)
            A, B = size * Vh[for_A], size * U[:, for_B]
            if self.clip:
                ratio = float(target.weight().abs().max()) / max(float((delta.scale * B @ A).abs().max()), 1e-30)
                A, B = (factor * math.sqrt(min(ratio, 1.0)) for factor in (A, B))
            delta.set_start(A, B)
            delta.freeze_start()

    def halves(self, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The indices among the top 2r directions that A and B take; always disjoint."""
        all_of_them = torch.arange(2 * rank)
        if self.direction == "ArBr":
            return all_of_them[1::2], all_of_them[::2]
        order = torch.randperm(2 * rank, generator=generator) if self.direction == "random" else all_of_them
        first, second = order[:rank], order[rank:]
        return (second, first) if self.direction == "A2rBr" else (first, second)

    def size(self, weight: Tensor, rank: int, scale: float) -> float:
        """The factor that both A and B are multiplied by."""
        if self.start_scale == "stable":
            return float(len(weight) ** 0.25 / math.sqrt(self.gamma))
        if self.start_scale == "gd":
            return 1 / scale
        if self.start_scale == "weightS":
            return float((truncated_svd(weight, rank)[1] / scale).sqrt().mean())
        return 1.0


catalogue.register(
    Method("lora-ga", "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "arXiv 2407.05000", "init",
           "A and B from the full gradient's singular directions", catalogue["lora"].delta, init=LoRAGA, random=False,
           needs="calibration with labels", defaults={"rslora": True, "alpha": 16.0})
)  # fmt: skip
