"""LoKr: the Kronecker product of a small and a large factor, the large one of low rank where that is smaller.

    dW = s (C x D)        C [a, c], D [b, d], out = a b, in = c d,  s = alpha / r
    D = D_a D_b of rank r unless r >= half its longer side; C = C_a C_b likewise, with ``both``
    C ~ U(-1/sqrt(c), 1/sqrt(c)), D = 0               (D = D_a D_b: D_b = 0)

Yeh et al., LyCORIS, arXiv 2309.14859; full Kronecker factors: Edalati et al., KronA, arXiv 2212.10650. LyCORIS starts D at zero, PEFT C: the
authors' code is followed. A convolution is split along its channels, D [b, d, kh, kw] as a matrix; the form with a core for the
kernel (``use_effective_conv2d``) is not offered. ``y = (C x D) x`` is D on the rows of x [c, d] and C on its columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout, PeftFormat
from graft.core.storage import patterns
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.additive import Additive
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import PLAIN, uniform
from graft.methods.families.peft_lora import by_pattern
from graft.methods.families.peft_options import refuse_others

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class LoKrDelta(Additive):
    """C [a, c] or C_a [a, r], C_b [r, c]; D [b, d] or D_a [b, r], D_b [r, d]."""

    def __init__(self, target: Target, layout: Layout, generator: torch.Generator):
        super().__init__(target)
        self._layout, (a, c), rank = layout, layout["left"], layout["rank"]
        for name, (rows, columns), whole in zip("CD", ((a, c), (target.shape[0] // a, target.shape[1] // c)), layout["whole"], strict=True):
            sizes = {name: (rows, columns)} if whole else {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
            for key, size in sizes.items():
                start = torch.zeros(size, dtype=target.dtype) if key in ("D", "D_b") else uniform(*size, generator, target.dtype)
                self.register_parameter(key, nn.Parameter(start))

    @property
    def layout(self) -> Layout:
        return dict(self._layout)

    def sides(self) -> tuple[Tensor, Tensor]:
        """C and D as matrices, the scale folded into C."""
        own = dict(self.named_parameters())
        C, D = (own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in "CD")
        return C * self._layout["scale"], D

    def update(self) -> Tensor:
        return torch.kron(*self.sides())

    def forward(self, x: Tensor) -> Tensor:
        C, D = self.sides()
        (a, c), d = C.shape, D.shape[1]
        # The two products cost 1/a + 1/d of the dense one, three times that with gradients; a dense dW has one dense gradient, or none.
        many = not torch.is_grad_enabled() and 2 * x.numel() > math.prod(self.target.shape)
        if self.target.kind not in PLAIN or many or 3 * (a + d) > a * d:
            return super().forward(x)
        inner = F.linear(x.reshape(*x.shape[:-1], c, d), D.to(x.dtype))
        return self.target.apply(x, self.target.weight(), self.target.bias) + (C.to(inner.dtype) @ inner).flatten(-2)

    def exported(self) -> dict[str, Tensor]:
        tensors = self.tensors()
        if isinstance(self.target.module, nn.Conv2d) and "D" in tensors:  # as PEFT keeps it
            tensors["D"] = tensors["D"].reshape(len(tensors["D"]), -1, *self.target.module.kernel_size)
        return tensors

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        super().restore({name: value.flatten(1) for name, value in exported.items()})


@dataclass(frozen=True, kw_only=True)
class LoKr(DeltaConfig):
    """Hyper-parameters of LoKr."""

    rank: int = option(8, "rank r of the large factor; from half its longer side on it is whole", paper="4..full", low=1)
    alpha: float | None = option(None, "numerator of the scale alpha / r; none: the rank", low=1e-6)
    factor: int | None = option(
        None, "sides a and c of C: this where it divides out and in, else the largest divisor below it and the root; none: the root", low=1
    )
    both: bool = option(False, "give C a low rank, too, where that is smaller")

    kinds: ClassVar[tuple[str, ...]] = LINEAR_KINDS
    peft: ClassVar[PeftFormat | None] = PeftFormat(
        "LOKR", {"C": "lokr_w1", "C_a": "lokr_w1_a", "C_b": "lokr_w1_b", "D": "lokr_w2", "D_a": "lokr_w2_a", "D_b": "lokr_w2_b"},
        ("r", "alpha", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both", "decompose_factor",
         "rank_pattern", "alpha_pattern"),
    )  # fmt: skip

    def split(self, size: int) -> int:
        """The left part of a side (PEFT's rule)."""
        if self.factor and size % self.factor == 0:
            return self.factor
        return largest_divisor(size, min(self.factor or size, math.isqrt(size)))

    def layout(self, out_features: int, channels: int) -> Layout:
        a, c = self.split(out_features), self.split(channels)
        whole = [not self.both or 2 * self.rank >= max(a, c), 2 * self.rank >= max(out_features // a, channels // c)]
        return {"rank": self.rank, "scale": 1.0 if self.alpha is None else self.alpha / self.rank, "left": [a, c], "whole": whole}

    def layout_at(self, target: Target) -> Layout:
        return self.layout(target.shape[0], target.shape[1] // window(target))

    def build(self, target: Target, layout: Layout, shared: nn.Module | None, generator: torch.Generator) -> LoKrDelta:
        return LoKrDelta(target, layout, generator)

    def parameters(self, out_features: int, in_features: int, kernel: int = 1) -> int:
        layout = self.layout(out_features, in_features // kernel)
        a, c = layout["left"]
        sides = ((a, c), (out_features // a, in_features // c))
        return sum(m * n if whole else self.rank * (m + n) for (m, n), whole in zip(sides, layout["whole"], strict=True))

    def total(self, targets: Sequence[Target]) -> int:
        return sum(self.parameters(*target.shape, window(target)) for target in targets)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        layouts = {name: delta.layout for name, delta in adapter.deltas.items() if isinstance(delta, LoKrDelta)}
        rank, rank_pattern = patterns({name: layout["rank"] for name, layout in layouts.items()})
        alpha, alpha_pattern = patterns({name: layout["scale"] * layout["rank"] for name, layout in layouts.items()})
        return {"r": rank, "rank_pattern": rank_pattern, "alpha": alpha, "alpha_pattern": alpha_pattern, "rank_dropout": 0.0, "module_dropout": 0.0,
                "rank_dropout_scale": False, "use_effective_conv2d": False, "decompose_both": self.both,
                "decompose_factor": self.factor or -1}  # fmt: skip

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[Self, dict[str, Layout]]:
        refuse_others(config, use_effective_conv2d=False)
        factor = None if config["decompose_factor"] == -1 else config["decompose_factor"]
        own, layouts = cls(rank=config["r"], alpha=config["alpha"], factor=factor, both=config["decompose_both"]), {}
        for name, tensors in shapes.items():
            rank = by_pattern(config.get("rank_pattern") or {}, name, config["r"])
            scale = by_pattern(config.get("alpha_pattern") or {}, name, config["alpha"]) / rank
            left = tensors["lokr_w1"] if "lokr_w1" in tensors else (tensors["lokr_w1_a"][0], tensors["lokr_w1_b"][1])
            layouts[name] = {"rank": rank, "scale": scale, "left": list(left), "whole": ["lokr_w1" in tensors, "lokr_w2" in tensors]}
        return own, layouts


def window(target: Target) -> int:
    """Positions of a convolution's kernel; 1 elsewhere."""
    return math.prod(target.module.kernel_size) if isinstance(target.module, nn.Conv2d) else 1


catalogue.register(Method("lokr", "LoKr: Low-Rank Kronecker Product (LyCORIS)", "arXiv 2309.14859", "delta", "a Kronecker product", LoKr))
