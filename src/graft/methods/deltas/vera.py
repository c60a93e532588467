"""VeRA: two trained vectors around frozen random matrices that all targets share.

    dW = diag(b) B diag(d) A        A [r, in], B [out, r] frozen, one pair for the adapter, sliced for each target
    d [r] = 0.1, b [out] = 0 trained;   A, B ~ U(-sqrt(6 / columns), sqrt(6 / columns))

Kopiczko et al., arXiv 2310.11454. Drawn as PEFT draws them, from the same seed, so that either can leave the bases out of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout, PeftFormat
from graft.core.errors import GraftError
from graft.core.target import Target
from graft.methods.families.bases import Bases, kaiming, largest
from graft.methods.families.diagonal import Diagonal
from graft.methods.families.factored import PLAIN

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class VeRADelta(Diagonal):
    """``b`` [out] and ``d`` [r]; the bases belong to the adapter."""

    bases: Bases

    def __init__(self, target: Target, rank: int, start: float, bases: Bases):
        super().__init__(target)
        self.refer(bases=bases)
        self.d = nn.Parameter(torch.full((rank,), start, dtype=target.dtype))
        self.b = nn.Parameter(torch.zeros(target.shape[0], dtype=target.dtype))

    @property
    def layout(self) -> Layout:
        return {"rank": len(self.d)}

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        rank, (out_features, in_features) = len(self.d), self.target.shape
        B, A = self.bases.leading("vera_B", out_features, rank), self.bases.leading("vera_A", rank, in_features)
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

    kinds: ClassVar[tuple[str, ...]] = PLAIN
    peft: ClassVar[PeftFormat | None] = PeftFormat(
        "VERA", {"b": "vera_lambda_b", "d": "vera_lambda_d"}, ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial")
    )

    def shared(self, targets: Sequence[Target], seed: int) -> Bases:
        (out_features, in_features), generator = largest(targets), torch.Generator().manual_seed(seed)
        A = kaiming((self.rank, in_features), generator)
        return Bases(self.save_bases, vera_A=A, vera_B=kaiming((out_features, self.rank), generator))

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank}

    def build(self, target: Target, layout: Layout, shared: nn.Module | None, generator: torch.Generator) -> VeRADelta:
        assert isinstance(shared, Bases)
        return VeRADelta(target, layout["rank"], self.start, shared)

    def parameters(self, out_features: int, in_features: int) -> int:
        return out_features + self.rank

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {"r": self.rank, "projection_prng_key": adapter.seed, "save_projection": self.save_bases, "vera_dropout": 0.0,
                "d_initial": self.start}  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[Self, dict[str, Layout]]:
        if not config.get("save_projection", True):
            raise GraftError("the PEFT adapter leaves its bases out (save_projection=False); save it in PEFT with them.")
        own = cls(rank=config["r"], start=config["d_initial"], save_bases=True)
        return own, {name: {"rank": own.rank} for name in shapes}


catalogue.register(Method("vera", "VeRA: Vector-based Random Matrix Adaptation", "arXiv 2310.11454", "delta", "vectors on shared random bases", VeRA))
