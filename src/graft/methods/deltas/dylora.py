"""DyLoRA: one LoRA that works at every rank up to R, because each update trains the first b ranks only, b drawn anew.

    dW_b = (alpha / b) B[:, :b] A[:b]        A [R, in], B [out, R] as LoRA's; b ~ uniform{lowest..R}, the same at all targets

Valipour et al., arXiv 2210.07558. The code multiplies both factors by sqrt(R / b) at scale alpha / R, which is the same, and draws for
each micro-batch; here b belongs to the update and comes from the seed and its number alone, equal on all ranks of a distributed run. As
there, ranks that are not drawn have gradient zero, so that AdamW's momentum moves them on. Evaluation, merges, factors and files use
the chosen rank (``use_rank``, :func:`set_rank`): a file is a plain LoRA of that rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.target import Target
from graft.kernels.lora import LowRankMap
from graft.methods.families import peft_lora
from graft.methods.families.factored import LowRank, scaling

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class DyLoRADelta(LowRank):
    """All R ranks; ``chosen`` of them are in use, ``sampled`` in training forwards (none: all), of which ``update = "last"`` trains one."""

    config: DyLoRA
    chosen: int | None = None
    sampled: int | None = None

    def first(self, rank: int | None) -> Tensor:
        """Which columns of B and rows of A are the first ``rank`` ones; with a frozen start also those of it."""
        index = torch.arange(min(rank or self.rank, self.rank), device=self.A.device)
        return index if self.A0 is None else torch.cat([index, index + self.rank])

    def growth(self, rank: int | None) -> float:
        """What multiplies the scale at ``rank``: R / b."""
        return self.rank / min(rank or self.rank, self.rank)

    def nested(self, rank: int | None) -> tuple[Tensor, Tensor]:
        """:meth:`product` of the first ``rank`` ranks."""
        (B, A), index = super().product(), self.first(rank)
        return B[:, index] * self.growth(rank), A[index]

    def product(self) -> tuple[Tensor, Tensor]:
        return self.nested(self.chosen)

    def map(self) -> LowRankMap:
        rank = self.sampled if self.training else self.chosen
        B, A = self.nested(rank)
        if self.training and self.config.update == "last":
            live = self.first(rank) == min(rank or self.rank, self.rank) - 1
            B, A = torch.where(live, B, B.detach()), torch.where(live[:, None], A, A.detach())
        return LowRankMap(self.target.weight(), self.target.bias, A, B)

    @property
    def layout(self) -> Layout:
        whole, rank = super().layout, min(self.chosen or self.rank, self.rank)
        inactive = [index for index in whole["inactive"] if index < rank]
        return {"rank": rank, "scale": self.scale * self.growth(rank), "frozen": min(whole["frozen"], rank), "inactive": inactive}

    def exported(self) -> dict[str, Tensor]:
        tensors, index = super().exported(), self.first(self.chosen)
        return {**tensors, "A": tensors["A"].index_select(0, index), "B": tensors["B"].index_select(1, index)}


@dataclass(frozen=True, kw_only=True)
class DyLoRA(DeltaConfig):
    """Hyper-parameters of DyLoRA."""

    rank: int = option(8, "largest rank R", paper="8", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / b; none: twice the largest rank", paper="16", low=1e-6)
    dropout: float = option(0.0, "chance of dropping an input of the branch while training", low=0, high=0.99)
    lowest: int = option(1, "smallest rank that is drawn", paper="1", low=1)
    update: Literal["all", "last"] = option("all", "which of the drawn ranks learn: all, or the last alone (the paper's frozen variant)")
    use_rank: int | None = option(None, "rank in use when not training; none: the largest", low=1)

    delta = DyLoRADelta
    peft = peft_lora.FORMAT

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("lowest", self.lowest), ("use_rank", self.use_rank or 1)):
            if value > self.rank:
                raise GraftError(f"DyLoRA.{name} is {value}, but it must be at most rank = {self.rank}.")

    def callbacks(self) -> list[Callback]:
        return [RankSampler(self)]

    def layout_at(self, target: Target) -> Layout:
        return {"rank": self.rank, "scale": scaling(self.alpha, self.rank, 2.0), "frozen": 0, "inactive": []}

    def prepare(self, adapter: Adapter, calibration: Any) -> None:
        set_rank(adapter, self.use_rank)

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.rank * (out_features + in_features)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> None:
        """None: what PEFT wrote is a plain LoRA."""


class RankSampler(Callback):
    """Draws the rank of each update."""

    def __init__(self, config: DyLoRA):
        self.config = config

    def drawn(self, step: int) -> int:
        """The rank that update number ``step`` trains."""
        largest = max(delta.rank for delta in _deltas(self.adapter))
        generator = torch.Generator().manual_seed(self.adapter.seed + 1_000_003 * step)
        return int(torch.randint(min(self.config.lowest, largest), largest + 1, (), generator=generator))

    def before_forward(self) -> None:
        rank = self.drawn(self.adapter.step)
        for delta in _deltas(self.adapter):
            delta.sampled = rank


def _deltas(adapter: Adapter) -> list[DyLoRADelta]:
    return [delta for delta in adapter.deltas.values() if isinstance(delta, DyLoRADelta)]


def set_rank(adapter: Adapter, rank: int | None) -> None:
    """Chooses the rank that a DyLoRA adapter uses when it does not train; None: the largest."""
    for delta in _deltas(adapter):
        if rank is not None and not 1 <= rank <= delta.rank:
            raise GraftError(f"rank is {rank}, but {delta.target.name} has {delta.rank} ranks: choose 1 to {delta.rank}.")
        delta.chosen = rank


catalogue.register(
    Method("dylora", "DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation", "arXiv 2210.07558", "delta",
           "a LoRA that works at every smaller rank", DyLoRA)
)  # fmt: skip
