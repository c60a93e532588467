"""SHiRA: trains a few entries of the weight directly, at positions chosen once.

    W' = W + S,   S [out, in] zero but for ``values [k]`` at fixed positions,  values = 0 at the start
    k = rank (out + in), as many as a LoRA of that rank, or fraction * out * in

Positions (``mask``): random; weight, the largest |W|; gradient, the largest |G| with G the full gradient on calibration data; snip,
the largest |W G|; struct, the diagonal and evenly spaced rows.

Bhardwaj et al., arXiv 2406.13175. PEFT has the random mask only. Switching adapters rewrites k entries of a merged weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.kernels.sparse import scatter, sparse_linear

if TYPE_CHECKING:
    from graft.core.adapter import Adapter
    from graft.core.calibration import Calibration


class SHiRADelta(Delta):
    """``values [k]`` at ``indices [k]``, flat positions in W [out, in], ascending."""

    config: SHiRA
    indices: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        count, (out_features, in_features) = layout["entries"], self.target.shape
        if not 1 <= count <= out_features * in_features:
            raise GraftError(f"{count} entries do not fit into {self.target.name} ({out_features} x {in_features}); lower rank or fraction.")
        if self.config.mask == "weight":
            indices = largest(self.target.weight().abs(), count)
        elif self.config.mask == "struct":
            indices = structured(self.target.shape, count)
        else:
            indices = torch.randperm(out_features * in_features, generator=generator)[:count].sort().values
        self.register_buffer("indices", indices)
        self.values = nn.Parameter(torch.zeros(count, dtype=self.target.dtype))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return scatter(self.target.weight().to(self.values.dtype), self.indices, self.values), self.target.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.target.kind in ("linear", "conv1d"):
            return sparse_linear(x, self.target.weight(), self.target.bias, self.indices, self.values)
        return super().forward(x)

    def entries(self) -> tuple[Tensor, Tensor]:
        return self.indices, self.values.detach()

    def exported(self) -> dict[str, Tensor]:
        width = self.target.shape[1]
        rows_columns = torch.stack([self.indices // width, self.indices % width]).to(torch.int32)
        return {"values": self.values.detach(), "indices": rows_columns}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        (out_features, in_features), (rows, columns) = self.target.shape, exported["indices"].long()
        flat = rows * in_features + columns
        outside = (rows < 0) | (rows >= out_features) | (columns < 0) | (columns >= in_features)
        if outside.any() or bool((flat.sort().values.diff() == 0).any()):
            raise GraftError(
                f"the positions of {self.target.name} lie outside its {out_features} x {in_features} weight or repeat; the adapter is broken."
            )
        self.indices.copy_(flat)
        self.values.copy_(exported["values"])


@dataclass(frozen=True, kw_only=True)
class SHiRA(DeltaConfig):
    """Hyper-parameters of SHiRA."""

    rank: int = option(8, "as many entries as a LoRA of this rank has parameters", paper="32 (peft)", low=1)
    fraction: float | None = option(None, "share of the entries, in place of rank", paper="0.01..0.02", low=0, high=1)
    mask: Literal["random", "weight", "gradient", "snip", "struct"] = option("random", "how the positions are chosen", paper="snip is best")

    delta = SHiRADelta
    peft = PeftFormat(
        "SHIRA", {"values": "shira_weight", "indices": "shira_indices"}, {"r": "rank"}, {"entries": ("shira_weight", 0)},
        unread={"mask_type": "random"}, others=("random_seed",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction is not None:
            self.refuse_unused("fraction says how many entries there are", "rank")

    def peft_format(self) -> PeftFormat | None:
        return self.peft if self.fraction is None else None

    def count(self, out_features: int, in_features: int) -> int:
        """How many entries k of a weight [out, in] are trained."""
        if self.fraction is not None:
            return max(1, math.ceil(self.fraction * out_features * in_features))
        return self.rank * (out_features + in_features)

    def layouts(self, targets: Sequence[Target], model: nn.Module, seed: int, calibration: Calibration | None) -> dict[str, Layout]:
        if self.mask in ("gradient", "snip") and calibration is None:
            raise GraftError(f"mask={self.mask!r} looks at gradients; pass calibration=a few batches with labels.")
        return {t.name: {"entries": self.count(*t.shape)} for t in targets}

    def prepare(self, adapter: Adapter, calibration: Calibration | None) -> None:
        if self.mask not in ("gradient", "snip") or calibration is None:
            return
        deltas = {delta.target: delta for delta in adapter.deltas.values() if isinstance(delta, SHiRADelta)}
        for target, gradient in calibration.gradients(list(deltas)):
            score = gradient.abs() if self.mask == "gradient" else (gradient * target.weight().cpu()).abs()
            deltas[target].indices.copy_(largest(score, len(deltas[target].indices)))

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.count(out_features, in_features)


def largest(score: Tensor, count: int) -> Tensor:
    """The flat positions of the ``count`` largest scores, ascending."""
    return score.reshape(-1).float().topk(count).indices.sort().values


def structured(shape: tuple[int, int], count: int) -> Tensor:
    """The diagonal, then whole rows spread evenly over the matrix, up to ``count`` flat positions, ascending."""
    rows, columns = shape
    diagonal = torch.arange(min(shape)) * (columns + 1)
    whole = max(1, math.ceil(count / columns))
    chosen = torch.linspace(0, rows - 1, min(whole, rows)).round().long().unique()  # type: ignore[no-untyped-call]
    order = torch.cat([chosen, torch.arange(rows)[~torch.isin(torch.arange(rows), chosen)]])
    filled = (order[:, None] * columns + torch.arange(columns)).reshape(-1)
    return torch.cat([diagonal, filled[~torch.isin(filled, diagonal)]])[:count].sort().values


catalogue.register(Method("shira", "Sparse High Rank Adapters", "arXiv 2406.13175", "delta", "trains 1-2% of the weight's entries", SHiRA))
