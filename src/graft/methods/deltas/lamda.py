"""LaMDA: a small core between two projections, of which one is frozen and the other freezes column by column.

    dW = s (B N A - B0 A)        A [r, in] frozen, N [r, r] trained, B [out, r] trained at first;  s = alpha / r
    W = U S V^T:  A = V_r^T,  B0 = B = U_r S_r,  N = I
    before update t of T the first f(t) = min(r, floor(r t / (eta T))) columns of B, those of the largest singular values, are frozen

Azizi et al., arXiv 2406.12832. The public code has neither this start nor the factor r of f, so that it freezes three columns at most; it
begins at B = 0 with random A and N instead (``spectral=False``). It stops the gradient of frozen columns; momentum and weight decay would
move them on, so here they are put back after every update, their moments forgotten, and with the last column B leaves the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graft.core import optimizer_state
from graft.core.callback import Callback, State
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Layout
from graft.core.target import Target
from graft.methods.families.factored import uniform
from graft.methods.families.rebuilt import save_bases
from graft.methods.families.three_factor import ThreeFactor, ThreeFactorConfig
from graft.methods.families.wrapped import refuse_distributed_wrapper
from graft.numerics.svd import truncated_svd


class LaMDADelta(ThreeFactor):
    """The first ``frozen`` columns of B get no gradient."""

    frozen = 0

    def product(self) -> tuple[Tensor, Tensor]:
        B = torch.cat([self.B[:, : self.frozen].detach(), self.B[:, self.frozen :]], 1) @ self.N
        if self.subtracted:
            B = B - self.get_buffer("B0") @ self.get_buffer("N0")
        return B * self.scale, self.A


@dataclass(frozen=True, kw_only=True)
class LaMDA(ThreeFactorConfig):
    """Hyper-parameters of LaMDA."""

    rank: int = option(32, "rank r of the update", paper="32..64", low=1)
    eta: float = option(0.3, "share of the updates after which all of B is frozen", paper="0.3", low=0)
    spectral: bool = option(True, "start from W's leading singular triplets; false: from zero, with random A and N")
    save_bases: bool = save_bases()

    trained = "BN"
    delta = LaMDADelta

    def callbacks(self) -> list[Callback]:
        return [Freezing(self)]

    @property
    def saves_frozen(self) -> bool:
        return self.save_bases

    def layout_at(self, target: Target) -> Layout:
        return {**super().layout_at(target), "subtracted": self.spectral}

    def start(self, target: Target, rank: int, generator: torch.Generator) -> Sequence[Tensor]:
        if self.spectral:
            U, S, V = truncated_svd(target.weight().to(target.dtype), rank)
            return U * S, torch.eye(rank), V
        A, N = (uniform(rank, width, generator, target.dtype) for width in (target.shape[1], rank))
        return torch.zeros(target.shape[0], rank), N, A


class Freezing(Callback):
    """Freezes B."""

    def __init__(self, config: LaMDA):
        self.config = config

    def frozen(self, step: int, rank: int) -> int:
        """How many of ``rank`` columns are frozen before update number ``step``."""
        end = self.config.eta * self.total_steps
        return rank if step >= end else int(rank * step / end + 1e-9)

    def deltas(self) -> list[LaMDADelta]:
        return [delta for delta in self.adapter.deltas.values() if isinstance(delta, LaMDADelta)]

    def on_start(self) -> None:
        self._freeze(self.adapter.step)

    def before_forward(self) -> None:
        refuse_distributed_wrapper("LaMDA freezes B during training, a change")

    def before_update(self, step: int) -> None:
        self.held = [delta.B[:, : delta.frozen].detach().clone() for delta in self.deltas()]

    def after_update(self, step: int) -> None:
        with torch.no_grad():
            for delta, values in zip(self.deltas(), self.held, strict=True):
                delta.B[:, : delta.frozen] = values
        self._freeze(step + 1)

    def _freeze(self, step: int) -> None:
        for delta in self.deltas():
            B, delta.frozen = delta.B, self.frozen(step, len(delta.N))
            B.requires_grad_(delta.frozen < len(delta.N))
            if B.requires_grad:
                optimizer_state.reset(self.optimizer, B, torch.arange(delta.frozen), dim=1)
            else:
                B.grad = None  # else the optimizer would go on applying the last gradient
                optimizer_state.drop(self.optimizer, B)

    def load_state_dict(self, state: State) -> None:
        self._freeze(self.adapter.step)


catalogue.register(
    Method("lamda", "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "arXiv 2406.12832", "delta",
           "a core and a projection that freezes", LaMDA, random=False)
)  # fmt: skip
