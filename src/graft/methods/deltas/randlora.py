"""RandLoRA: a full-rank update as a sum of frozen random low-rank products with trained diagonal scales.

    m = min(out, in), M = max(out, in), n = ceil(m / r)
    frozen, one pair for the whole adapter, sliced for each target:  A [r, m],  B [M, n, r], unit variance
    trained:  lambda [r, n] = 0,  gamma [n, m] = 1 / max(n, m)
    dW = s sum_j B_j diag(lambda_:j) A diag(gamma_j:)      [M, m], transposed where out < in

Albert et al., arXiv 2502.00987. Scale: the authors' code has s = alpha / r / sqrt(n) with alpha = 2 r, PEFT s = alpha / r with
alpha = 20 r; ``scale_rule`` says which. Column k of B_j is paired in PEFT's order (its B is flattened as (n, r), its A as (r, n)):
a permutation of random columns, equal in distribution to the formula, and exactly what a PEFT file means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.methods.families.bases import Bases, largest
from graft.methods.families.factored import check_rank

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


def unit(base: Tensor) -> Tensor:
    """``base`` over its own deviation; a single number, or one where every entry is zero, has none and stays finite."""
    deviation = base.std() if base.numel() > 1 else base.abs().max()
    return base / deviation if deviation > 0 else base


class RandLoRADelta(Delta):
    """lambda [r, n] and gamma [n, m]; the bases belong to the adapter."""

    shared: Bases

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, rank = self.target, layout["rank"]
        check_rank(rank, target)
        self.scale, smallest, count = float(layout["scale"]), min(target.shape), math.ceil(min(target.shape) / rank)
        self.lambda_ = nn.Parameter(torch.zeros(rank, count, dtype=target.dtype))
        self.gamma = nn.Parameter(torch.full((count, smallest), 1 / max(count, smallest), dtype=target.dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        (r, n), (M, m) = self.lambda_.shape, (max(self.target.shape), min(self.target.shape))
        A, B = self.shared.leading("randlora_A", r, 1, m), self.shared.leading("randlora_B", M, n)
        wide = (self.lambda_[:, :, None] * A * self.gamma).reshape(r * n, m)
        tall = B.reshape(M, n * r).to(wide.dtype) * self.scale
        out_features, in_features = self.target.shape
        return (tall, wide) if out_features >= in_features else (wide.T, tall.T)

    def weight(self) -> tuple[Tensor, Tensor | None]:
        B, A = self.factors()
        return torch.addmm(self.target.weight().to(B.dtype), B, A), self.target.bias

    # PEFT has one scale for the whole adapter: a file holds it as 1, with each target's own scale in lambda.
    def exported(self) -> dict[str, Tensor]:
        return {**self.tensors(), "lambda_": self.lambda_.detach() * self.scale}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        super().restore({**exported, "lambda_": exported["lambda_"] / self.scale})


@dataclass(frozen=True, kw_only=True)
class RandLoRA(DeltaConfig):
    """Hyper-parameters of RandLoRA."""

    rank: int = option(32, "rank r of each base; a smaller one means more parameters", paper="6..100, usually 30", low=1)
    alpha: float | None = option(None, "numerator of the scale; none: 2 r (authors) or 20 r (peft)", low=1e-6)
    scale_rule: Literal["authors", "peft"] = option("authors", "alpha / r / sqrt(n) or alpha / r")
    bases: Literal["uniform", "sparse", "very sparse"] = option("uniform", "distribution of the frozen bases", paper="uniform")
    save_bases: bool = option(True, "write the bases into the file, which PEFT needs; false: draw them again from the seed")

    delta = RandLoRADelta
    peft = PeftFormat(
        "RANDLORA", {"lambda_": "randlora_lambda", "gamma": "randlora_gamma"}, {"r": "rank", "save_projection": "save_bases"},
        unread={"randlora_dropout": 0.0}, others=("randlora_alpha", "projection_prng_key", "sparse", "very_sparse"),
    )  # fmt: skip

    def shared(self, targets: Sequence[Target], seed: int) -> Bases:
        """A [r, 1, m] and B [M, n, r], as large as PEFT makes them: from the largest out and the largest in."""
        smaller, larger = sorted(largest(targets))
        generator = torch.Generator().manual_seed(seed)
        A = torch.rand((self.rank, 1, smaller), generator=generator)
        B = torch.rand((larger, math.ceil(smaller / self.rank), self.rank), generator=generator)
        if self.bases == "uniform":
            A, B = A - 0.5, B - 0.5
        else:  # -1, 0 or 1, with probability 1 / (2 sparsity) for either sign
            sparsity = 3.0 if self.bases == "sparse" else math.sqrt(smaller)
            A, B = ((x > 1 - 0.5 / sparsity).float() - (x < 0.5 / sparsity).float() for x in (A, B))
        return Bases(self.save_bases, randlora_A=unit(A), randlora_B=unit(B))

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "scale": self.scale(target)}

    def scale(self, target: Target) -> float:
        """The effective scale s at a target."""
        if self.scale_rule == "peft":
            return (20 * self.rank if self.alpha is None else self.alpha) / self.rank
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / self.rank / math.sqrt(math.ceil(min(target.shape) / self.rank))

    def parameters(self, out_features: int, in_features: int) -> int:
        smallest = min(out_features, in_features)
        return math.ceil(smallest / self.rank) * (self.rank + smallest)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        sparse = {"sparse": self.bases == "sparse", "very_sparse": self.bases == "very sparse"}
        return {**super().to_peft(adapter), "randlora_alpha": self.rank, "projection_prng_key": adapter.seed, **sparse}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        raise GraftError("RandLoRA adapters that PEFT wrote are not read (it repeats the bases in every layer); Graft writes them for PEFT.")


catalogue.register(
    Method(
        "randlora",
        "RandLoRA: Full-rank parameter-efficient fine-tuning",
        "arXiv 2502.00987",
        "delta",
        "scaled sum of shared frozen random products",
        RandLoRA,
    )
)
