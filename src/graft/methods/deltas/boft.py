"""BOFT: rotates the inputs of a map by a product of sparse rotations, each between other inputs, as a fast Fourier transform does.

    W' = diag(g) W B_1 B_2 ... B_m,  b' = b,    B_i = P_i blockdiag(R_i1, ..., R_ik) P_i^T,  R_ij = (I - Q_ij)^-1 (I + Q_ij) [b, b]
    Q = (Z - Z^T) / 2, Z [m, k, b, b] trained from 0;  g [out] trained from 1
    P_i orders the half blocks of every 2^(i-1) neighbouring blocks: the 1st, 3rd, 5th ... of them, then the 2nd, 4th, ...

Liu et al., arXiv 2311.06243; gains, order and signs as in the authors' code and PEFT. With m = 1 it is OFT and the gains. Where b does not
fit the inputs, the nearest size does, and where m factors do not, fewer; PEFT refuses such sizes. PEFT without its CUDA kernel knows m = 1
only and refuses other files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import nearest_divisor
from graft.methods.families.multiplicative import InputMap
from graft.numerics.orthogonal import cayley, times_blocks


class BOFTDelta(InputMap):
    """``Z`` [m, k, b, b] and ``gains`` [out]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        (out_features, in_features), block = self.target.shape, layout["block"]
        self.Z = nn.Parameter(torch.zeros(layout["factors"], in_features // block, block, block, dtype=self.target.dtype))
        self.gains = nn.Parameter(torch.ones(out_features, dtype=self.target.dtype))

    def times(self, rows: Tensor, transposed: bool = False) -> Tensor:
        rotations = cayley((self.Z - self.Z.mT) / 2)
        rows, order = rows.to(rotations.dtype), range(len(rotations))
        for level in reversed(order) if transposed else order:
            blocks = rotations[level].mT if transposed else rotations[level]
            if level == 0:
                rows = times_blocks(rows, blocks)
            else:
                half = blocks.shape[-1] // 2
                rows = _exchange(times_blocks(_exchange(rows, 2, 2**level, half), blocks), 2**level, 2, half)
        return rows

    def weight(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().weight()
        return weight * self.gains[:, None], bias

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        if not self.on_inputs(x):
            return Delta.forward(self, x)
        y = target.scale(target.apply(self.times(x, transposed=True).to(x.dtype), target.weight()), self.gains)
        return y if target.bias is None else y + target.bias.to(y.dtype)

    def exported(self) -> dict[str, Tensor]:
        gains = self.gains.detach()
        return {"Z": self.Z.detach(), "gains": gains[None] if self.target.kind == "conv2d" else gains[:, None]}  # PEFT's shapes

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        self.Z.copy_(exported["Z"])
        self.gains.copy_(exported["gains"].flatten())


def _exchange(rows: Tensor, first: int, second: int, width: int) -> Tensor:
    """Pieces of ``width`` in groups of ``first x second``, each group transposed."""
    return rows.reshape(*rows.shape[:-1], -1, first, second, width).transpose(-3, -2).reshape(rows.shape)


def structure(in_features: int, block: int, factors: int) -> tuple[int, int]:
    """The size of the blocks and the number of factors that fit this many inputs; a size of 0 where there is nothing to rotate."""
    fitting = ((nearest_divisor(in_features, block, 2 ** (count - 1)), count) for count in range(factors, 0, -1))
    return next(((size, count) for size, count in fitting if size is not None), (0, 0))


@dataclass(frozen=True, kw_only=True)
class BOFT(DeltaConfig):
    """Hyper-parameters of BOFT."""

    block: int = option(8, "size b of the blocks; at each target the nearest (even if factors > 1) that fits its inputs", paper="2..8", low=2)
    factors: int = option(2, "butterfly factors m; at each target as many as its inputs have halves for", paper="1..6", low=1, high=16)

    kinds = LINEAR_KINDS
    delta = BOFTDelta
    peft = PeftFormat(
        "BOFT", {"Z": "boft_R", "gains": "boft_s"}, {"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
        {"block": ("boft_R", 3), "factors": ("boft_R", 0)}, fixed={"bias": "none"},
        unread={"boft_block_num": 0, "boft_dropout": 0.0},  # the dropout of whole blocks plays no part after training
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        block, factors = structure(target.shape[1], self.block, self.factors)
        if block == 0:
            raise GraftError(f"{target} has one input, and a rotation takes two; narrow the targets.")
        return {"block": block, "factors": factors}

    def parameters(self, out_features: int, in_features: int) -> int:
        block, factors = structure(in_features, self.block, self.factors)
        return factors * in_features * block + out_features

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        sizes = {tuple(tensors["boft_R"])[::3] for tensors in shapes.values()}
        if len(sizes) > 1:
            raise GraftError("the PEFT adapter has blocks of several sizes (boft_block_num); give PEFT boft_block_size instead.")
        ((factors, block),) = sizes  # without CUDA there is one factor, whatever the config says
        return super().from_peft({**config, "boft_block_size": block, "boft_n_butterfly_factor": factors}, shapes)


catalogue.register(
    Method("boft", "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", "arXiv 2311.06243", "delta",
           "a butterfly of rotations of the inputs", BOFT, random=False)
)  # fmt: skip
