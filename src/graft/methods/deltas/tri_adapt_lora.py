"""TriAdaptLoRA: a triangular core between two factors that grows where it changes most, up to a global budget of ranks.

    dW = s B C A,  C = L + U^T        B [out, rho], A [rho, in] ~ N(0, 0.02^2), also of new ranks;  L = U = 0;  s = alpha / r for good
    ranks come in blocks, the first of r_0, then of d; L and U [rho, rho] are lower triangular by blocks, the diagonal blocks in both
    u = ||C||_F / blocks;  I = u - u at the last check;  q = (t - t_w) / (T - t_w);  the K targets of the largest I grow by a block
    K = int((R - R_now) q)  (linear)  or  int((R - R_now)^q)  (non-linear), at least 1;  R = r * targets
    penalty  w mean over targets of (||A A^T - I||_F + ||B^T B - I||_F), active ranks only

Liang et al., arXiv 2501.08008. As the authors' code is, but for what is broken there: it starts B and C at zero, so that nothing ever gets a
gradient; it rescales what is learned by rho / (rho + d) at each growth; and all targets over a threshold grow, past the budget. Here the
largest structure is there from the beginning and growing switches ranks on, so that moments and learning rates are the optimizer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from graft.core.callback import Callback, State
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.factored import Factored, check_rank, scaling


class TriAdaptLoRADelta(Factored):
    """A, B, and the entries of L and U, row by row, as ``lower`` and ``upper``; ranks that are not ``active`` take no part."""

    not_saved = frozenset({"places"})
    active: Tensor
    places: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, self.sizes, rank = float(layout["scale"]), list(layout["blocks"]), layout["rank"]
        check_rank(rank, self.target)
        (out_features, in_features), dtype = self.target.shape, self.target.dtype
        A, B = (0.02 * torch.randn(shape, generator=generator) for shape in ((rank, in_features), (out_features, rank)))
        self.A, self.B = nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))
        block = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes), output_size=rank)
        self.register_buffer("places", (block[:, None] >= block).flatten().nonzero()[:, 0])
        self.lower, self.upper = (nn.Parameter(torch.zeros(len(self.places), dtype=dtype)) for _ in range(2))
        active = torch.ones(rank, dtype=torch.bool)
        active[layout["inactive"]] = False
        self.register_buffer("active", active)

    @property
    def layout(self) -> Layout:
        inactive = torch.nonzero(~self.active).flatten().tolist()
        return {"rank": len(self.A), "blocks": self.sizes, "scale": self.scale, "inactive": inactive}

    def core(self) -> Tensor:
        """C [rho, rho], zero where a rank is not active."""
        rank, mask = len(self.A), self.active.to(self.A)
        lower, upper = (entries.new_zeros(rank**2).index_put((self.places,), entries).view(rank, rank) for entries in (self.lower, self.upper))
        core: Tensor = (lower + upper.T) * mask * mask[:, None]
        return core

    def product(self) -> tuple[Tensor, Tensor]:
        return self.B @ self.core() * self.scale, self.A

    @property
    def blocks(self) -> int:
        """How many blocks are active."""
        ends = torch.tensor(self.sizes).cumsum(0)
        return int((ends <= int(self.active.sum())).sum())

    def grow(self) -> None:
        """Switches the next block on."""
        self.active[: sum(self.sizes[: self.blocks + 1])] = True


@dataclass(frozen=True, kw_only=True)
class TriAdaptLoRA(DeltaConfig):
    """Hyper-parameters of TriAdaptLoRA."""

    rank: int = option(8, "average rank r that the budget allows", paper="8", low=1)
    initial_rank: int = option(1, "rank r_0 of every target at the start", paper="1", low=1)
    block: int | None = option(None, "ranks d that a target grows by; none: half of rank", paper="rank / 2", low=1)
    largest_rank: int | None = option(None, "rank that no target grows beyond; none: twice rank, or the target's smaller side", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: twice rank", low=1e-6)
    dropout: float = option(0.0, "chance of dropping an input of the branch while training", low=0, high=0.99)
    growth: Literal["linear", "non-linear"] = option("linear", "how many targets grow at a check", paper="linear")
    warmup: float = option(0.1, "share of the updates before the first check", low=0, high=0.99)
    interval: int = option(10, "updates between two checks", unit="updates", low=1)
    orthogonality: float = option(0.5, "weight w of the penalty", paper="0.5", low=0)

    kinds = LINEAR_KINDS
    delta = TriAdaptLoRADelta

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_rank > self.rank:
            raise GraftError(f"TriAdaptLoRA.initial_rank is {self.initial_rank}, but it cannot be above rank = {self.rank}.")
        if self.largest_rank is not None and self.largest_rank < self.rank:
            raise GraftError(f"TriAdaptLoRA.largest_rank is {self.largest_rank}, but it must be at least rank = {self.rank}.")

    def callbacks(self) -> list[Callback]:
        return [Growth(self)]

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """The blocks of the largest structure at a target of this shape."""
        block = self.block or max(1, self.rank // 2)
        largest = min(2 * self.rank if self.largest_rank is None else self.largest_rank, *shape)
        return [self.initial_rank, *[block] * ((largest - self.initial_rank) // block)]

    def layout_at(self, target: Target) -> Layout:
        check_rank(self.rank, target)
        sizes, scale = self.sizes(target.shape), scaling(self.alpha, self.rank, 2.0)
        return {"rank": sum(sizes), "blocks": sizes, "scale": scale, "inactive": list(range(self.initial_rank, sum(sizes)))}

    def parameters(self, out_features: int, in_features: int) -> int:
        sizes = self.sizes((out_features, in_features))
        return sum(sizes) * (out_features + in_features) + sum(2 * size * sum(sizes[: i + 1]) for i, size in enumerate(sizes))


class Growth(Callback):
    """Watches the cores and lets them grow; ``t`` counts finished updates."""

    def __init__(self, config: TriAdaptLoRA):
        self.config = config
        self.last: dict[str, float] = {}  # u of each target at the last check

    def deltas(self) -> dict[str, TriAdaptLoRADelta]:
        return {name: delta for name, delta in self.adapter.deltas.items() if isinstance(delta, TriAdaptLoRADelta)}

    def penalty(self) -> Tensor | None:
        if not self.config.orthogonality:
            return None
        norms = []
        for delta in self.deltas().values():
            for rows in (delta.A[delta.active], delta.B.T[delta.active]):
                norms.append(torch.linalg.vector_norm(rows @ rows.T - torch.eye(len(rows)).to(rows)))
        return self.config.orthogonality * torch.stack(norms).sum() / (len(norms) / 2)

    def wanted(self, left: int, t: int) -> int:
        """K, with ``left`` ranks of the budget."""
        first = int(self.config.warmup * self.total_steps)
        progress = (t - first) / max(1, self.total_steps - first)
        return max(1, int(left * progress if self.config.growth == "linear" else left**progress))

    def after_update(self, step: int) -> None:
        t, deltas = step + 1, self.deltas()
        left = self.config.rank * len(deltas) - sum(int(delta.active.sum()) for delta in deltas.values())
        if t <= int(self.config.warmup * self.total_steps) or t % self.config.interval or left <= 0:
            return
        with torch.no_grad():
            sizes = {name: float(delta.core().norm()) / delta.blocks for name, delta in deltas.items()}
        importance = {name: size - self.last.get(name, 0.0) for name, size in sizes.items()}
        self.last = sizes
        growing = [name for name, delta in deltas.items() if delta.blocks < len(delta.sizes)]
        # Sorting is stable: equal targets grow in the model's order, the same in every process.
        for name in sorted(growing, key=lambda name: -importance[name])[: self.wanted(left, t)]:
            size = deltas[name].sizes[deltas[name].blocks]
            if size <= left:
                left -= size
                deltas[name].grow()

    def state_dict(self) -> State:
        return dict(self.last)

    def load_state_dict(self, state: State) -> None:
        self.last = {name: size for name, size in state.items() if isinstance(size, float)}


catalogue.register(
    Method("tri-adapt-lora", "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation", "arXiv 2501.08008", "delta",
           "a triangular core that grows to a budget", TriAdaptLoRA)
)  # fmt: skip
