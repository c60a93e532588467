"""OFT: rotates the inputs of a map within blocks, so that the angles between its neurons stay.

    W' = W R,  R = blockdiag(R_1, ..., R_k) [in, in],  R_i = (I - Q_i)^-1 (I + Q_i) [b, b] orthogonal (Cayley)
    Q_i skew-symmetric, its upper triangle q_i [b (b - 1) / 2] trained from 0, which is R = I;    ``share``: one q for all blocks
    ``terms`` n: R_i = I - 2 Q_i + 2 Q_i^2 - ... +- Q_i^(n - 1), Neumann's series in place of the inverse, of Q with the other sign

Qiu et al., arXiv 2306.07280; the series: Qiu et al., arXiv 2506.19847. Signs are PEFT's, whose exact and approximate R turn in opposite
directions. Where b does not divide the inputs the nearest size does, as in PEFT, but never 1, which would turn nothing. PEFT runs a
convolution by adding up overlapping patches, which is not what it merges; here both are what it merges. The constrained COFT is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import nearest_divisor
from graft.methods.families.multiplicative import InputMap
from graft.numerics.orthogonal import cayley, cayley_neumann, skew, times_blocks

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class OFTDelta(InputMap):
    """``q`` [k, b (b - 1) / 2], or [1, ...] where blocks share it."""

    config: OFT

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.block, inputs = layout["block"], self.target.shape[1]
        blocks = 1 if self.config.share else inputs // self.block
        self.q = nn.Parameter(torch.zeros(blocks, self.block * (self.block - 1) // 2, dtype=self.target.dtype))

    def times(self, rows: Tensor, transposed: bool = False) -> Tensor:
        Q = skew(self.q, self.block)
        R = cayley(Q) if self.config.terms is None else cayley_neumann(-Q, self.config.terms)
        return times_blocks(rows.to(R.dtype), R.mT if transposed else R)


def block_size(target: Target, wanted: int) -> int:
    """The size of the blocks at a target; raises :class:`GraftError` where there is nothing to rotate."""
    size = nearest_divisor(target.shape[1], wanted)
    if size is None:
        raise GraftError(f"{target} has one input, and a rotation takes two; narrow the targets.")
    return size


@dataclass(frozen=True, kw_only=True)
class OFT(DeltaConfig):
    """Hyper-parameters of OFT."""

    block: int = option(32, "size b of the blocks; at each target the nearest that divides its inputs", paper="16..128", low=2)
    share: bool = option(False, "all blocks of a target turn alike")
    terms: int | None = option(None, "terms n of Neumann's series in place of an inverse; none: exact", paper="5", low=4)

    kinds = LINEAR_KINDS
    delta = OFTDelta
    peft = PeftFormat(
        "OFT", {"q": "oft_R.weight"}, {"block_share": "share"}, fixed={"coft": False, "bias": "none"}, unread={"r": 0, "module_dropout": 0.0},
        others=("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "eps"),
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"block": block_size(target, self.block)}

    def parameters(self, out_features: int, in_features: int) -> int:
        block = nearest_divisor(in_features, self.block) or 1
        return (1 if self.share else in_features // block) * block * (block - 1) // 2

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        series: dict[str, Any] = {"use_cayley_neumann": self.terms is not None}
        if self.terms is not None:
            series |= {"num_cayley_neumann_terms": self.terms, "peft_version": "0.18.0"}  # the series as since then
        return {**super().to_peft(adapter), "oft_block_size": self.block, **series}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> Self | None:
        series, blocks = config["use_cayley_neumann"], {read_block(tensors) for tensors in shapes.values()}
        if series and "peft_version" not in config:
            raise GraftError("the PEFT adapter was made before PEFT 0.18, when use_cayley_neumann meant another series; train it again.")
        if config["r"] and len(blocks) > 1:
            raise GraftError(f"the PEFT adapter has r = {config['r']} blocks in targets of different widths; give PEFT oft_block_size instead.")
        terms = config["num_cayley_neumann_terms"] if series else None
        return cls.parse({**cls.peft.read(config), "block": config["oft_block_size"] or min(blocks), "terms": terms})

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        return {"block": read_block(shapes)}


def read_block(shapes: Mapping[str, Sequence[int]]) -> int:
    """The size b of blocks with b (b - 1) / 2 numbers each."""
    return (1 + math.isqrt(1 + 8 * shapes["oft_R.weight"][1])) // 2


catalogue.register(
    Method("oft", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "arXiv 2306.07280", "delta", "rotations of the inputs", OFT,
           random=False)
)  # fmt: skip
