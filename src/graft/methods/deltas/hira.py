"""HiRA: a low-rank matrix that multiplies W entry by entry, so that the update has a high rank.

    W' = W + W o (B A)        o entry by entry; A [r, in] and B [out, r] trained
    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0             (embeddings: A = 0, B ~ N(0, 1))

Huang et al., ICLR 2025, openreview TwJrTz9cRS. No scale, as in the paper and in PEFT. rank(dW) <= r rank(W); where W is zero it stays zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.methods.families.additive import Additive
from graft.methods.families.factored import check_rank, uniform


class HiRADelta(Additive):
    """A [r, in] and B [out, r]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, (out_features, in_features), rank = self.target, self.target.shape, layout["rank"]
        check_rank(rank, target)
        A, B = uniform(rank, in_features, generator, target.dtype), torch.zeros(out_features, rank, dtype=target.dtype)
        if target.kind == "embedding":
            A, B = torch.zeros_like(A), torch.randn(B.shape, generator=generator).to(target.dtype)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def update(self) -> Tensor:
        return self.target.weight().to(self.A.dtype) * (self.B @ self.A)

    def file_key(self, key: str, peft: PeftFormat | None) -> str:
        return super().file_key(f"embedding_{key}" if self.target.kind == "embedding" else key, peft)

    def exported(self) -> dict[str, Tensor]:
        A, B = self.A.detach(), self.B.detach()
        if isinstance(self.target.module, nn.Conv2d):  # PEFT's form: a convolution down to r channels, and a 1 x 1 convolution up
            A, B = A.reshape(len(A), *self.target.module.weight.shape[1:]), B[:, :, None, None]
        return {"A": A, "B": B}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        super().restore({name: value.flatten(1) for name, value in exported.items()})


@dataclass(frozen=True, kw_only=True)
class HiRA(DeltaConfig):
    """Hyper-parameters of HiRA."""

    rank: int = option(32, "rank r of the factor", paper="32", low=1)

    delta = HiRADelta
    peft = PeftFormat(
        "HIRA", {"A": "hira_A", "B": "hira_B", "embedding_A": "hira_embedding_A", "embedding_B": "hira_embedding_B"},
        {"r": "rank"}, patterns={"rank_pattern": "rank"}, unread={"hira_dropout": 0.0},
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features)

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        return {"rank": next(shape[0] for name, shape in shapes.items() if name.endswith("A"))}  # not rank_pattern, which PEFT does not follow


catalogue.register(
    Method("hira", "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", "openreview TwJrTz9cRS (ICLR 2025)", "delta",
           "W times B A, entry by entry", HiRA)
)  # fmt: skip
