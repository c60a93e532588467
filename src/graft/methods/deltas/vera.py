"""VeRA: two trained vectors around frozen random matrices that all targets share.

    dW = diag(b) B diag(d) A        A [r, in], B [out, r] frozen, one pair for the adapter, sliced for each target
    d [r] = 0.1, b [out] = 0 trained;   A, B ~ U(-sqrt(6 / columns), sqrt(6 / columns))

Kopiczko et al., arXiv 2310.11454. Drawn as PEFT draws them, from the same seed, so that either can leave the bases out of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.methods.families.bases import Bases, kaiming, largest
from graft.methods.families.diagonal import Diagonal
from graft.methods.families.factored import PLAIN

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class VeRADelta(Diagonal):
    """``b`` [out] and ``d`` [r]; the bases belong to the adapter."""

    config: VeRA
    shared: Bases

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, rank = self.target, layout["rank"]
        self.d = nn.Parameter(torch.full((rank,), self.config.start, dtype=target.dtype))
        self.b = nn.Parameter(torch.zeros(target.shape[0], dtype=target.dtype))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        rank, (out_features, in_features) = len(self.d), self.target.shape
        B, A = self.shared.leading("vera_B", out_features, rank), self.shared.leading("vera_A", rank, in_features)
        return B.to(self.d), self.d, A.to(self.d)

    def product(self) -> tuple[Tensor, Tensor]:
        B, A = super().product()
        return self.b[:, None] * B, A

    def forward(self, x: Tensor) -> Tensor:
        target, (B, d, A) = self.target, self.parts()
        branch = target.mix(target.scale(target.apply(x, A), d), B)
        return target.apply(x, target.weight(), target.bias) + target.scale(branch, self.b)


@dataclass(frozen=True, kw_only=True)
class VeRA(DeltaConfig):
    """Hyper-parameters of VeRA."""

    rank: int = option(256, "rank r of the shared bases", paper="64..1024", low=1)
    start: float = option(0.1, "what every d begins at", paper="0.1", low=1e-9)
    save_bases: bool = option(False, "write the bases into the file; false: draw them again from the seed")

    kinds = PLAIN
    delta = VeRADelta
    peft = PeftFormat(
        "VERA", {"b": "vera_lambda_b", "d": "vera_lambda_d"}, {"r": "rank", "d_initial": "start", "save_projection": "save_bases"},
        unread={"vera_dropout": 0.0}, others=("projection_prng_key",),
    )  # fmt: skip

    def shared(self, targets: Sequence[Target], seed: int) -> Bases:
        (out_features, in_features), generator = largest(targets), torch.Generator().manual_seed(seed)
        A = kaiming((self.rank, in_features), generator)
        return Bases(self.save_bases, vera_A=A, vera_B=kaiming((out_features, self.rank), generator))

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank}

    def parameters(self, out_features: int, in_features: int) -> int:
        return out_features + self.rank

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {**super().to_peft(adapter), "projection_prng_key": adapter.seed}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        if not config.get("save_projection", True):
            raise GraftError("the PEFT adapter leaves its bases out (save_projection=False); save it in PEFT with them.")
        return super().from_peft({"save_projection": True, **config}, shapes)


catalogue.register(Method("vera", "VeRA: Vector-based Random Matrix Adaptation", "arXiv 2310.11454", "delta", "vectors on shared random bases", VeRA))
