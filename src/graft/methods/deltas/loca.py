"""LoCA: dW is the inverse cosine transform of a few coefficients, whose places are learned too.

    dW = s C_out^T F C_in        F [out, in] zero but for F[r_i, c_i] += a_i, i = 1..n;  C orthonormal DCT-II;  a = 0 at the start
    (r_i, c_i) = round(clamp(p_i, 0, 0.999) * (out - 1, in - 1)),  p [2, n] ~ U(0, 1)

With Z = C_out G C_in^T, the transform of G = s dL/d(dW):  da_i = Z[r_i, c_i], and places learn by central differences,
dr_i = clamp(a_i (Z[r_i + 1, c_i] - Z[r_i - 1, c_i]) / 2, -1, 1), straight through the rounding; dc_i alike. For the first ``share`` of the
updates 10 that train a and 20 that train p take turns; then places stay. Du et al., arXiv 2502.06820. The code counts forwards and toggles
inside them; here updates count, and what rests has gradient zero (none when the optimizer steps). Files hold a and whole-numbered places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graft.core import optimizer_state
from graft.core.callback import Callback
from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.target import Target
from graft.methods.families.additive import Additive
from graft.methods.families.bases import Transforms
from graft.methods.families.factored import PLAIN
from graft.methods.families.groups import apart
from graft.numerics.transforms import analyse, dct_matrix, synthesise

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class _Synthesis(torch.autograd.Function):
    """``C_out^T F C_in`` from a [n] and places [2, n] that are rounded here; the gradient of places by central differences."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, places: Tensor, left: Tensor, right: Tensor) -> Tensor:
        rows, columns = places.round().long()
        ctx.save_for_backward(a, rows, columns, left, right)
        coefficients = a.new_zeros(len(left), len(right)).index_put((rows, columns), a, accumulate=True)
        return synthesise(coefficients, left, right)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        a, rows, columns, left, right = ctx.saved_tensors
        Z = analyse(gradient, left, right)
        last = len(left) - 1, len(right) - 1
        d_rows = Z[(rows + 1).clamp(max=last[0]), columns] - Z[(rows - 1).clamp(min=0), columns]
        d_columns = Z[rows, (columns + 1).clamp(max=last[1])] - Z[rows, (columns - 1).clamp(min=0)]
        return Z[rows, columns], (0.5 * a * torch.stack([d_rows, d_columns])).clamp(-1, 1), None, None


class LoCADelta(Additive):
    """``a`` [n] and ``p`` [2, n]; the transforms belong to the adapter. ``learning`` names what gets a gradient that is not zero."""

    learning: tuple[str, ...] = ("a", "p")
    config: LoCA
    shared: Transforms
    p: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, dtype = float(layout["scale"]), self.target.dtype
        self.a = nn.Parameter(torch.zeros(layout["count"], dtype=dtype))
        p = torch.rand(2, layout["count"], generator=generator).to(dtype)
        if self.config.share:
            self.p = nn.Parameter(p)
        else:
            self.register_buffer("p", p)

    @property
    def steps(self) -> Tensor:
        """out - 1 and in - 1, as a column: how many steps of one place p goes through from 0 to 1."""
        return self.a.new_tensor(self.target.shape)[:, None] - 1

    def update(self) -> Tensor:
        # A zero gradient rather than none: DistributedDataParallel waits for every parameter.
        a, p = (value if name in self.learning else value.detach() + 0 * value for name, value in (("a", self.a), ("p", self.p)))
        left, right = (C.to(a) for C in self.shared.sides(self.target))
        update: Tensor = _Synthesis.apply(a, p.clamp(0, 0.999) * self.steps, left, right)  # type: ignore[no-untyped-call]
        return update * self.scale

    def exported(self) -> dict[str, Tensor]:
        return {"a": self.a.detach(), "places": (self.p.detach().clamp(0, 0.999) * self.steps).round().int()}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        self.a.copy_(exported["a"])
        self.p.copy_(exported["places"] / self.steps.clamp(min=1))


@dataclass(frozen=True, kw_only=True)
class LoCA(DeltaConfig):
    """Hyper-parameters of LoCA."""

    count: int = option(1000, "coefficients n at each target", paper="1000", low=1)
    scale: float = option(1.0, "scale s of the update", paper="1 and more")
    share: float = option(0.1, "share of the updates in which places learn, in turns after a; 0: they stay as drawn", paper="0.1", low=0, high=1)
    value_updates: int = option(10, "updates of a in each turn", unit="updates", paper="10", low=1)
    place_updates: int = option(20, "updates of the places in each turn", unit="updates", paper="20", low=1)
    place_lr: float = option(1e-4, "learning rate of the places", paper="1e-4", low=0)

    kinds = PLAIN
    delta = LoCADelta

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.share:
            self.refuse_unused("with share = 0 places stay as drawn", "value_updates", "place_updates", "place_lr")

    def callbacks(self) -> list[Callback]:
        return [Turns(self)] if self.share else []

    def shared(self, targets: Sequence[Target], seed: int) -> Transforms:
        return Transforms(targets, dct_matrix)

    def layout_at(self, target: Target) -> Layout:
        return {"count": self.count, "scale": self.scale}

    def groups(self, adapter: Adapter, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        places = [delta.p for delta in adapter.deltas.values() if isinstance(delta, LoCADelta) and isinstance(delta.p, nn.Parameter)]
        return apart(super().groups(adapter, lr, weight_decay), places, lr=self.place_lr, weight_decay=0.0)

    def parameters(self, out_features: int, in_features: int) -> int:
        return (3 if self.share else 1) * self.count


class Turns(Callback):
    """Lets coefficients and places learn in turns."""

    def __init__(self, config: LoCA):
        self.config = config

    @property
    def end(self) -> int:
        """The updates in which places may learn."""
        return round(self.config.share * self.total_steps)

    def learns(self, step: int) -> str:
        """What update number ``step`` trains: ``"a"`` or ``"p"``."""
        position = step % (self.config.value_updates + self.config.place_updates)
        return "p" if step < self.end and position >= self.config.value_updates else "a"

    def deltas(self) -> list[LoCADelta]:
        return [delta for delta in self.adapter.deltas.values() if isinstance(delta, LoCADelta)]

    def before_forward(self) -> None:
        for delta in self.deltas():
            delta.learning = (self.learns(self.adapter.step),)

    def before_update(self, step: int) -> None:
        for delta in self.deltas():
            resting = delta.p if self.learns(step) == "a" else delta.a
            resting.grad = None  # or momentum would move it

    def after_update(self, step: int) -> None:
        if step + 1 == self.end:
            for delta in self.deltas():
                optimizer_state.drop(self.optimizer, delta.p)


catalogue.register(
    Method("loca", "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", "arXiv 2502.06820", "delta",
           "cosine coefficients at learned places", LoCA)
)  # fmt: skip
