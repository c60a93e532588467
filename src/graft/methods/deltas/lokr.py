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
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.additive import Additive
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import PLAIN, scaling, uniform

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class LoKrDelta(Additive):
    """C [a, c] or C_a [a, r], C_b [r, c]; D [b, d] or D_a [b, r], D_b [r, d]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        (out_features, in_features), (a, c), rank = self.target.shape, layout["left"], layout["rank"]
        self.scale = float(layout["scale"])
        for name, (rows, columns), whole in zip("CD", ((a, c), (out_features // a, in_features // c)), layout["whole"], strict=True):
            sizes = {name: (rows, columns)} if whole else {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
            for key, size in sizes.items():
                zero = key in ("D", "D_b")
                start = torch.zeros(size, dtype=self.target.dtype) if zero else uniform(*size, generator, self.target.dtype)
                self.register_parameter(key, nn.Parameter(start))

    def sides(self) -> tuple[Tensor, Tensor]:
        """C and D as matrices, the scale folded into C."""
        own = dict(self.named_parameters())
        C, D = (own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"] for name in "CD")
        return C * self.scale, D

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

    kinds = LINEAR_KINDS
    delta = LoKrDelta
    peft = PeftFormat(
        "LOKR", {"C": "lokr_w1", "C_a": "lokr_w1_a", "C_b": "lokr_w1_b", "D": "lokr_w2", "D_a": "lokr_w2_a", "D_b": "lokr_w2_b"},
        {"r": "rank", "alpha": "alpha", "decompose_both": "both"}, alpha="alpha", fixed={"use_effective_conv2d": False},
        unread={"rank_dropout": 0.0, "module_dropout": 0.0, "rank_dropout_scale": False}, others=("decompose_factor",),
    )  # fmt: skip

    def split(self, size: int) -> int:
        """The left part of a side (PEFT's rule)."""
        if self.factor and size % self.factor == 0:
            return self.factor
        return largest_divisor(size, min(self.factor or size, math.isqrt(size)))

    def structure(self, out_features: int, channels: int) -> Layout:
        a, c = self.split(out_features), self.split(channels)
        whole = [not self.both or 2 * self.rank >= max(a, c), 2 * self.rank >= max(out_features // a, channels // c)]
        return {"rank": self.rank, "scale": scaling(self.alpha, self.rank, 1.0), "left": [a, c], "whole": whole}

    def layout_at(self, target: Target) -> Layout:
        return self.structure(target.shape[0], target.shape[1] // window(target))

    def parameters(self, out_features: int, in_features: int, kernel: int = 1) -> int:
        layout = self.structure(out_features, in_features // kernel)
        a, c = layout["left"]
        sides = ((a, c), (out_features // a, in_features // c))
        return sum(m * n if whole else self.rank * (m + n) for (m, n), whole in zip(sides, layout["whole"], strict=True))

    def total(self, targets: Sequence[Target]) -> int:
        return sum(self.parameters(*target.shape, window(target)) for target in targets)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        return {**super().to_peft(adapter), "decompose_factor": self.factor or -1}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        factor = None if config["decompose_factor"] == -1 else config["decompose_factor"]
        return cls.parse({**cls.peft.read(config), "factor": factor})

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        left = shapes["lokr_w1"] if "lokr_w1" in shapes else (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
        return {**self.peft.layout(target.name, config, shapes), "left": list(left), "whole": ["lokr_w1" in shapes, "lokr_w2" in shapes]}


def window(target: Target) -> int:
    """Positions of a convolution's kernel; 1 elsewhere."""
    return math.prod(target.module.kernel_size) if isinstance(target.module, nn.Conv2d) else 1


catalogue.register(Method("lokr", "LoKr: Low-Rank Kronecker Product (LyCORIS)", "arXiv 2309.14859", "delta", "a Kronecker product", LoKr))
