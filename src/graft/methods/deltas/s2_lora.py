"""S2-LoRA: all targets of one shape share one trained low-rank pair, and each weighs its ranks by a sparse vector of its own.

    dW_n = B diag(s_n) A         A [r, in], B [out, r] one pair a shape,  s_n [r] one vector a target, all trained
    A, B ~ N(0, 0.02^2),  s_n = 0
    loss + o sum over pairs (||A A^T - I||_F^2 + ||B^T B - I||_F^2)
    after each update: s <- sign(s) max(|s| - lr l, 0)        (the proximal step of l ||s||_1: exact zeros)

Liu et al., arXiv 2309.11756. No code is public: that pairs are kept by shape, the start, and the orthogonality term are those of AdaLoRA, from
which the method descends, and fit the published number of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored, check_rank

DEVIATION = 0.02


class SharedPairs(nn.Module):
    """One pair ``B [out, r], A [r, in]`` for each shape among the targets."""

    def __init__(self, targets: Sequence[Target], rank: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for target in targets:
            check_rank(rank, target)
            for name, size in zip(_names(target), ((target.shape[0], rank), (rank, target.shape[1])), strict=True):
                if not hasattr(self, name):
                    self.register_parameter(name, nn.Parameter((DEVIATION * torch.randn(size, generator=generator)).to(target.dtype)))

    def pair(self, target: Target) -> tuple[Tensor, Tensor]:
        B, A = (getattr(self, name) for name in _names(target))
        return B, A


def _names(target: Target) -> tuple[str, str]:
    shape = "x".join(map(str, target.shape))
    return f"B_{shape}", f"A_{shape}"


class S2LoRADelta(Factored):
    """``s`` [r]; the pair belongs to the adapter."""

    shared: SharedPairs

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.s = nn.Parameter(torch.zeros(layout["rank"], dtype=self.target.dtype))

    def product(self) -> tuple[Tensor, Tensor]:
        B, A = self.shared.pair(self.target)
        return B * self.s, A

    def factors(self) -> tuple[Tensor, Tensor]:
        """The ranks that are in use; all of them where none is."""
        B, A = self.product()
        used = self.s != 0 if self.s.any() else torch.ones_like(self.s, dtype=torch.bool)
        return B[:, used], A[used]


class Sparsity(Callback):
    """Keeps the pairs near orthonormal and makes the weights of ranks sparse."""

    def __init__(self, config: S2LoRA):
        self.config = config

    def penalty(self) -> Tensor | None:
        if not self.config.orthogonality:
            return None
        assert isinstance(self.adapter.shared, SharedPairs)
        grams = [p.T @ p if name.startswith("B") else p @ p.T for name, p in self.adapter.shared.named_parameters()]
        return self.config.orthogonality * torch.stack([(g - torch.eye(len(g)).to(g)).square().sum() for g in grams]).sum()

    def after_update(self, step: int) -> None:
        rates = {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}
        with torch.no_grad():
            for delta in self.adapter.deltas.values():
                if isinstance(delta, S2LoRADelta):
                    delta.s.copy_(torch.nn.functional.softshrink(delta.s, float(rates[id(delta.s)]) * self.config.sparsity))


@dataclass(frozen=True, kw_only=True)
class S2LoRA(DeltaConfig):
    """Hyper-parameters of S2-LoRA."""

    rank: int = option(32, "rank r of the shared pairs", paper="8..32", low=1)
    sparsity: float = option(1e-2, "weight l of the weights' 1-norm", low=0)
    orthogonality: float = option(0.1, "weight o of the orthogonality term", paper="AdaLoRA: 0.1..0.5", low=0)

    kinds = LINEAR_KINDS
    delta = S2LoRADelta

    def callbacks(self) -> list[Callback]:
        return [Sparsity(self)]

    def shared(self, targets: Sequence[Target], seed: int) -> SharedPairs:
        return SharedPairs(targets, self.rank, seed)

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features + 1)

    def total(self, targets: Sequence[Target]) -> int:
        """Counts each pair once."""
        return self.rank * (sum(map(sum, {target.shape for target in targets})) + len(targets))


catalogue.register(
    Method("s2-lora", "Sparsely Shared LoRA on Whisper for Child Speech Recognition", "arXiv 2309.11756", "delta",
           "one pair a shape, sparse ranks a target", S2LoRA)
)  # fmt: skip
