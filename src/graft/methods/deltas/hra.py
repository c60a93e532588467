"""HRA: reflects the inputs of a map at r trained hyperplanes, one after the other.

    W' = W H_1 H_2 ... H_r,    H_i = I - 2 u_i u_i^T / |u_i|^2,    u [in, r] trained; the reflections of a pair begin equal and cancel
    H_1 ... H_r = I - U T U^T, U the unit vectors, T^-1 = I / 2 + the strict upper triangle of U^T U: an update of rank r
    penalty  lambda * sum over targets of |I - U^T U|_F^2        u_1, u_3, ... ~ U(-1/sqrt(r/2), 1/sqrt(r/2))

Yuan et al., arXiv 2405.17484. Its limit of strictly orthogonal vectors (lambda = infinity; PEFT's ``apply_GS``) is left out: vectors that
begin equal have no such form. PEFT also makes adapters of odd r, which start elsewhere; they are read, and not made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import uniform
from graft.methods.families.multiplicative import InputMap
from graft.numerics.orthogonal import householder

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class HRADelta(InputMap):
    """``u`` [in, r]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        rank = layout["rank"]
        halves = uniform(self.target.shape[1], (rank + 1) // 2, generator, self.target.dtype)
        self.u = nn.Parameter(halves.repeat_interleave(2, 1)[:, :rank].contiguous())

    def unit(self) -> Tensor:
        """U [in, r]."""
        return torch.nn.functional.normalize(self.u, dim=0)

    def times(self, rows: Tensor, transposed: bool = False) -> Tensor:
        U = self.unit()
        V = householder(U)
        left, right = (V.T, U.T) if transposed else (U, V)
        return rows - rows.to(U.dtype) @ left @ right

    def factors(self) -> tuple[Tensor, Tensor]:
        U = self.unit()
        V = householder(U)
        return -self.target.weight().to(U.dtype) @ U, V


@dataclass(frozen=True, kw_only=True)
class HRA(DeltaConfig):
    """Hyper-parameters of HRA."""

    rank: int = option(8, "reflections r, an even number", paper="8..32", low=2)
    orthogonality: float = option(0.0, "weight lambda of the penalty", paper="0..1e-3", low=0)

    kinds = LINEAR_KINDS
    delta = HRADelta
    peft = PeftFormat("HRA", {"u": "hra_u"}, {"r": "rank"}, fixed={"apply_GS": False, "bias": "none"}, others=("init_weights",))

    def callbacks(self) -> list[Callback]:
        return [Orthogonality(self.orthogonality)] if self.orthogonality else []

    def layout_at(self, target: Target) -> Layout:
        if self.rank % 2 or self.rank > target.shape[1]:
            raise GraftError(f"HRA.rank is {self.rank}, but at {target} it must be even and at most {target.shape[1]}, the inputs.")
        return {"rank": self.rank}

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {**super().to_peft(adapter), "init_weights": self.rank % 2 == 0}

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        return {"rank": self.rank}  # an odd number, too

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * in_features


class Orthogonality(Callback):
    """Draws the reflections of a target towards orthogonal ones."""

    def __init__(self, strength: float):
        self.strength = strength

    def penalty(self) -> Tensor:
        units = [delta.unit() for delta in self.adapter.deltas.values() if isinstance(delta, HRADelta)]
        residuals = [torch.eye(U.shape[1], dtype=U.dtype, device=U.device) - U.T @ U for U in units]
        return self.strength * torch.stack([residual.square().sum() for residual in residuals]).sum()


catalogue.register(Method("hra", "Householder Reflection Adaptation", "arXiv 2405.17484", "delta", "a product of reflections of the inputs", HRA))
