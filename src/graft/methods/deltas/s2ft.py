"""S2FT: trains whole channels of the MLP and whole heads of the attention, chosen once over all layers together.

    columns (down, o):  W'[:, c] = W[:, c] + D,   D [out, s] = 0:    y = x W^T + x[..., c] D^T
    rows    (up, v):    W'[r, :] = W[r, :] + D,   D [s, in] = 0:     y = x W^T;  y[..., r] += x D^T

The backward pass reads only ``x[..., c]`` (partial back-propagation): dD = dy^T x[..., c].

Yang et al., arXiv 2412.06289. The reference permutes the coupled weights (up and gate rows with down columns; v rows with o
columns) so that the chosen units are one slice; here the base is never written to, so the units keep their original numbers and are
gathered. :func:`coupled_order` gives that permutation for a copy that is laid out for serving. Attention is moved in groups of query
heads that share a key head, which the reference gets wrong for grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.target import Target
from graft.methods.families.factored import PLAIN

if TYPE_CHECKING:
    from graft.core.calibration import Calibration

COLUMNS = ("down", "o")  # roles whose chosen units are inputs; for the others they are outputs


class S2FTDelta(Delta):
    """``slice``: D [out, s] for columns, [s, in] for rows, at ``index [s]`` in the weight's own numbering."""

    not_saved = frozenset({"index"})
    index: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        (out_features, in_features), self.columns, index = self.target.shape, layout["columns"], torch.tensor(layout["index"])
        if index.min() < 0 or index.max() >= (in_features if self.columns else out_features) or len(torch.unique(index)) < len(index):
            raise GraftError(f"the channels chosen for {self.target.name} lie outside its weight or repeat; the adapter is broken.")
        self.register_buffer("index", index)
        shape = (out_features, len(index)) if self.columns else (len(index), in_features)
        self.slice = nn.Parameter(torch.zeros(shape, dtype=self.target.dtype))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        return self.target.weight().to(self.slice.dtype).index_add(1 if self.columns else 0, self.index, self.slice), self.target.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.target.apply(x, self.target.weight(), self.target.bias)
        if self.columns:
            return y + F.linear(x.index_select(-1, self.index), self.slice.to(x.dtype))
        return y.index_add(-1, self.index, F.linear(x, self.slice.to(x.dtype)))

    def factors(self) -> tuple[Tensor, Tensor]:
        size = self.target.shape[1 if self.columns else 0]
        selector = F.one_hot(self.index, size).to(self.slice.dtype)  # [s, size]
        return (self.slice, selector) if self.columns else (selector.T, self.slice)


@dataclass(frozen=True, kw_only=True)
class S2FT(DeltaConfig):
    """Hyper-parameters of S2FT: which share of the units of each projection is trained."""

    down: float = option(0.03, "share of MLP channels, as columns of down", paper="0.02..0.03", low=0, high=1)
    up: float = option(0.0, "share of MLP channels, as rows of up", paper="0", low=0, high=1)
    o: float = option(0.0, "share of heads, as columns of o", paper="0..0.05", low=0, high=1)
    v: float = option(0.0, "share of key-value heads, as rows of v", paper="0", low=0, high=1)
    select: Literal["random", "weight", "activation"] = option("random", "units by chance, or by the norm of weights or activations")
    smallest: bool = option(False, "take the units with the smallest norm instead of the largest")

    kinds = PLAIN
    delta = S2FTDelta

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select == "random":
            self.refuse_unused("select = 'random' looks at no norms", "smallest")

    def layouts(self, targets: Sequence[Target], model: nn.Module, seed: int, calibration: Calibration | None) -> dict[str, Layout]:
        shares = {"down": self.down, "up": self.up, "o": self.o, "v": self.v}
        layouts: dict[str, Layout] = {}
        for role, share in shares.items():
            chosen = [t for t in targets if t.role == role]
            if not share or not chosen:
                continue
            widths = {t.name: unit_width(t, model) for t in chosen}
            scores = self._scores(chosen, widths, seed, calibration)
            keep = max(1, round(share * len(scores)))
            ranking = scores.argsort(descending=not self.smallest, stable=True)[:keep]
            picked = torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, ranking, True)
            start = 0
            for target in chosen:
                width = widths[target.name]
                units = target.shape[1 if role in COLUMNS else 0] // width
                own = torch.nonzero(picked[start : start + units]).flatten()
                start += units
                if len(own):
                    index = (own[:, None] * width + torch.arange(width)).flatten()
                    layouts[target.name] = {"columns": role in COLUMNS, "index": index.tolist()}
        if not layouts:
            found = sorted({t.role for t in targets})
            raise GraftError(
                f"S2FT adapts down, up, o and v with a share above 0, but the targets have the roles {', '.join(found)}; "
                "set down, up, o or v, or choose other targets."
            )
        return layouts

    def _scores(self, targets: Sequence[Target], widths: dict[str, int], seed: int, calibration: Calibration | None) -> Tensor:
        """One number for each unit of all targets, by which units are ranked over all layers together."""
        columns = targets[0].role in COLUMNS
        norms: dict[str, Tensor] = {}
        if self.select == "random":
            generator = torch.Generator().manual_seed(seed + 1_000_003 * ("down", "up", "o", "v").index(targets[0].role))
            norms = {t.name: torch.rand(t.shape[1 if columns else 0] // widths[t.name], generator=generator) for t in targets}
            return torch.cat(list(norms.values()))
        if self.select == "weight":
            norms = {t.name: t.weight().float().square().sum(0 if columns else 1) for t in targets}
        else:
            if calibration is None:
                raise GraftError("select='activation' looks at activations; pass calibration=a few batches.")
            if not columns:
                raise GraftError("select='activation' ranks inputs, so it fits down and o; use 'weight' or 'random' for up and v.")
            norms = {name: moment.diagonal() for name, moment in calibration.covariances(targets).items()}
        return torch.cat([norms[t.name].cpu().reshape(-1, widths[t.name]).sum(1) for t in targets])

    def parameters(self, out_features: int, in_features: int) -> int:
        """At a down projection; the other roles have their own shares."""
        return out_features * max(1, round(self.down * in_features)) if self.down else 0

    def total(self, targets: Sequence[Target]) -> int:
        """Exact for MLP channels; heads are wider than one channel, so shares of them are rounded to whole heads when they are chosen."""
        shares, total = {"down": self.down, "up": self.up, "o": self.o, "v": self.v}, 0
        for target in targets:
            rows, columns = target.shape
            width, units = (rows, columns) if target.role in ("down", "o") else (columns, rows)
            share = shares.get(target.role, 0.0)
            total += width * max(1, round(share * units)) if share else 0
        return total


def unit_width(target: Target, model: nn.Module) -> int:
    """How many neighbouring channels form one unit: one in an MLP, a head in attention."""
    if target.role not in ("o", "v"):
        return 1
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise GraftError("heads can be chosen only where the model's config has num_attention_heads; set o=0 and v=0.")
    if target.role == "v":
        heads = getattr(config, "num_key_value_heads", None) or heads
    return target.shape[1 if target.role == "o" else 0] // int(heads)


def coupled_order(first: Tensor, second: Tensor, count: int) -> Tensor:
    """An order of ``count`` units in which ``first`` and ``second`` are each one slice: [only first, both, only second, rest]."""
    in_first, in_second = (torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen, True) for chosen in (first, second))
    parts = (in_first & ~in_second, in_first & in_second, ~in_first & in_second, ~in_first & ~in_second)
    return torch.cat([torch.nonzero(part).flatten() for part in parts])


catalogue.register(
    Method("s2ft", "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity", "arXiv 2412.06289", "delta",
           "trains whole channels and heads", S2FT)
)  # fmt: skip
