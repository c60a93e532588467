"""LoRA-SB: LoRA-XS that starts at the best rank-r image of the first update that full fine-tuning would make.

    G [out, in] = mean over batches of dL/dW;   D = -eta sign(G) = U S V^T    (the first step of Adam at learning rate eta)
    dW = s B N A,    B = U_r, A = V_r^T frozen,  N [r, r] trained from diag(S_r) / s

Ponkshe et al., arXiv 2411.19557. B and A are orthonormal, so with s = 1 a gradient step on N is the full gradient's step projected on their
spans. The model starts one (approximate) step away from the base: W stays as it is, and the adapter's first dW is the rank-r part of D.
eta in the authors' code counts batches of the gradient's loader; here it is an option.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Init
from graft.core.errors import GraftError
from graft.methods.families.three_factor import ThreeFactor
from graft.numerics.svd import truncated_svd

if TYPE_CHECKING:
    from graft.core.adapter import Adapter
    from graft.core.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class LoRASB(Init):
    """Hyper-parameters of LoRA-SB."""

    first_step: float = option(1e-5, "size eta of the step that the start approximates", paper="learning rate / warm-up updates", low=0)

    def prepare(self, adapter: Adapter, calibration: Calibration | None) -> None:
        deltas = {d.target: d for name, d in adapter.deltas.items() if isinstance(d, ThreeFactor) and name not in adapter.whole_targets}
        if len(deltas) + len(adapter.whole_targets) < len(adapter.deltas) or any(d.subtracted or not d.saved for d in deltas.values()):
            raise GraftError("LoRA-SB fills frozen factors that files must hold; combine it with LoRAXS(save_bases=True).")
        if calibration is None:
            raise GraftError("LoRA-SB looks at gradients; pass calibration=a few batches with labels.")
        for target, gradient in calibration.gradients(list(deltas)):
            delta = deltas[target]
            U, S, Vh = truncated_svd(-self.first_step * gradient.sign().to(delta.B), len(delta.N), seed=adapter.seed)
            with torch.no_grad():
                for factor, value in ((delta.B, U), (delta.N, torch.diag(S) / delta.scale), (delta.A, Vh)):
                    factor.copy_(value)


catalogue.register(
    Method("lora-sb", "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank Fine-Tuning",
           "arXiv 2411.19557", "init", "LoRA-XS on the first full update", catalogue["lora-xs"].delta, init=LoRASB, starts_as_identity=False,
           random=False, needs="calibration with labels", defaults={"save_bases": True})
)  # fmt: skip
