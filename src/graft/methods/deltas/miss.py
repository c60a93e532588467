"""MiSS: sums the input over contiguous shards and multiplies the sum by one trained matrix.

    y = W x + b + (sum_g x_g) D,  x padded to shards x_g [r]        dW[o, j] = D[j mod r, o]
    D [r, out] = 0 at the start, or (``mini``) D [r, m] repeated along out

Kang et al., arXiv 2409.15371, as the paper and PEFT have it since its second version (the first is :mod:`bone`). It is LoRA with the
frozen A = [I I ... I] [r, in], B = D^T and scale 1, and runs as that.
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
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class MiSSDelta(Factored):
    """``D`` [r, m], m dividing out."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        (out_features, in_features), rank, width = self.target.shape, layout["rank"], layout["width"]
        if not 1 <= rank <= in_features:
            raise GraftError(f"rank is {rank}, but {self.target} has {in_features} inputs: choose 1 to {in_features}, or other targets.")
        if out_features % width:
            raise GraftError(f"mini is {width}, but it must divide the outputs of {self.target}; choose another or none.")
        self.D = nn.Parameter(torch.zeros(rank, width, dtype=self.target.dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        (out_features, in_features), (rank, width) = self.target.shape, self.D.shape
        shards = torch.eye(rank, dtype=self.D.dtype, device=self.D.device).repeat(1, -(-in_features // rank))
        return self.D.T.repeat(out_features // width, 1), shards[:, :in_features]


@dataclass(frozen=True, kw_only=True)
class MiSS(DeltaConfig):
    """Hyper-parameters of MiSS."""

    rank: int = option(64, "width r of the shards", paper="16..128", low=1)
    mini: int | None = option(None, "columns m of D, which must divide the outputs; none: as many as outputs", low=1)
    dropout: float = option(0.0, "chance of dropping an input of the branch while training", low=0, high=0.99)

    kinds = LINEAR_KINDS
    delta = MiSSDelta
    peft = PeftFormat(
        "MISS", {"D": "miss_block"}, {"r": "rank", "miss_dropout": "dropout"}, {"rank": ("miss_block", 0), "width": ("miss_block", 1)},
        fixed={"bias": "none"}, others=("mini_r", "init_weights"),
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "width": self.mini or target.shape[0]}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (self.mini or out_features)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {**super().to_peft(adapter), "mini_r": self.mini or 1, "init_weights": "mini" if self.mini else True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        mini = config["mini_r"] if config["init_weights"] == "mini" else None
        return None if config["init_weights"] == "bat" else cls.parse({**cls.peft.read(config), "mini": mini})


catalogue.register(
    Method("miss", "MiSS: Matrix Shard Sharing", "arXiv 2409.15371", "delta", "one matrix on summed shards of the input", MiSS, random=False)
)
