"""DeLoRA: a low-rank update whose directions and strength are learned apart.

    dW = sum_i (lambda / r) b_i a_i^T diag(w) / (|b_i| |a_i|)        A [r, in] (rows a_i), B [out, r] (columns b_i), lambda [1] trained
    w [in]: the norms of W's columns, frozen;  norms below 1e-4 count as 1e-4
    A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, lambda as given;  every term has norm at most lambda / r max(w), dW at most lambda max(w)

Bini et al., arXiv 2503.18225. The paper scales by the one norm |W|, PEFT (integrated by the authors) by the norm of each column: PEFT is
followed, in the start, too: B = 0 gives dW = 0 thanks to the least norm. The first update already has about full strength, whatever the
learning rate. w is in the file: it is what the adapter was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored, check_rank, uniform

LEAST = 1e-4  # a norm that is divided by is at least this


class DeLoRADelta(Factored):
    """A [r, in], B [out, r] and the strength [1]; ``norms`` [in] of W's columns."""

    config: DeLoRA
    norms: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, (out_features, in_features), rank = self.target, self.target.shape, layout["rank"]
        check_rank(rank, target)
        self.A = nn.Parameter(uniform(rank, in_features, generator, target.dtype))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=target.dtype))
        self.strength = nn.Parameter(torch.full((1,), self.config.strength, dtype=target.dtype))
        self.register_buffer("norms", torch.linalg.vector_norm(target.weight(), dim=0, dtype=target.dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        lengths = self.A.norm(dim=1).clamp(min=LEAST) * self.B.norm(dim=0).clamp(min=LEAST)
        return self.B * (self.strength / len(self.A) / lengths), self.A * self.norms


@dataclass(frozen=True, kw_only=True)
class DeLoRA(DeltaConfig):
    """Hyper-parameters of DeLoRA."""

    rank: int = option(8, "rank r of the update", paper="4..32", low=1)
    strength: float = option(15.0, "what lambda, the bound of the update relative to W's columns, begins at", paper="15 (peft)", low=1e-9)

    kinds = LINEAR_KINDS
    delta = DeLoRADelta
    peft = PeftFormat(
        "DELORA", {"A": "delora_A", "B": "delora_B", "strength": "delora_lambda", "norms": "delora_w_norm"},
        {"r": "rank", "delora_lambda": "strength"}, {"rank": ("delora_A", 0)}, {"rank_pattern": "rank"},
        unread={"lambda_pattern": {}, "module_dropout": 0.0},  # lambda itself is in the file
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features) + 1


catalogue.register(
    Method("delora", "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation", "arXiv 2503.18225", "delta",
           "normalised B A with a trained strength", DeLoRA)
)  # fmt: skip
