"""C3A: every block of the update is a circulant matrix, given by one vector.

    dW = C / in,  block (i, j) of C [b, b] with entries w_ij[(q - p) mod b] in row p, column q        w [out / b, in / b, b] trained from 0

Chen et al., arXiv 2407.19342: the update of a block is a circular convolution, done by FFT; w is a block's first row. The paper and PEFT start
w at random (Xavier), which changes the function a little; w = 0 trains as well, since dW is linear in w. The factor 1 / in is PEFT's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.methods.families.additive import Additive
from graft.methods.families.blocks import largest_divisor
from graft.methods.families.factored import PLAIN
from graft.numerics.circulant import circulant, circulant_linear


class C3ADelta(Additive):
    """``w`` [out / b, in / b, b]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        (out_features, in_features), block = self.target.shape, layout["block"]
        self.w = nn.Parameter(torch.zeros(out_features // block, in_features // block, block, dtype=self.target.dtype))

    def kernels(self) -> Tensor:
        """The first columns of the blocks: w backwards, its first entry in place."""
        return self.w.flip(-1).roll(1, -1) / self.target.shape[1]

    def update(self) -> Tensor:
        return circulant(self.kernels())

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        # Transforms of small blocks, or of many inputs, take longer than the matrix itself.
        if target.kind not in PLAIN or self.w.shape[2] < 16 or 2 * x.numel() > math.prod(target.shape):
            return super().forward(x)
        return target.apply(x, target.weight(), target.bias) + circulant_linear(x.to(self.w.dtype), self.kernels()).to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class C3A(DeltaConfig):
    """Hyper-parameters of C3A."""

    block: int = option(256, "size b of a block; where it does not divide out and in, the largest divisor of both below it", paper="128..768", low=1)

    kinds = PLAIN
    delta = C3ADelta
    peft = PeftFormat("C3A", {"w": "c3a_kernel"}, {"block_size": "block"}, {"block": ("c3a_kernel", 2)}, {"block_size_pattern": "block"})

    def fitting(self, out_features: int, in_features: int) -> int:
        """The size of a block at a target of this shape."""
        return largest_divisor(math.gcd(out_features, in_features), self.block)

    def layout_at(self, target: Target) -> Layout:
        return {"block": self.fitting(*target.shape)}

    def parameters(self, out_features: int, in_features: int) -> int:
        return out_features * in_features // self.fitting(out_features, in_features)


catalogue.register(
    Method("c3a", "C3A: Parameter-Efficient Fine-Tuning via Circular Convolution", "arXiv 2407.19342", "delta", "circulant blocks", C3A, random=False)
)
