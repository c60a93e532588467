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
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout, PeftFormat
from graft.core.errors import GraftError
from graft.core.target import LINEAR_KINDS, Target
from graft.methods.families.blocks import nearest_divisor
from graft.methods.families.multiplicative import InputMap
from graft.methods.families.peft_options import refuse_others
from graft.numerics.orthogonal import cayley, cayley_neumann, skew, times_blocks

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class OFTDelta(InputMap):
    """``q`` [k, b (b - 1) / 2], or [1, ...] where blocks share it."""

    def __init__(self, target: Target, block: int, share: bool, terms: int | None):
        super().__init__(target)
        self.block, self.terms = block, terms
        self.q = nn.Parameter(torch.zeros(1 if share else target.shape[1] // block, block * (block - 1) // 2, dtype=target.dtype))

    @property
    def layout(self) -> Layout:
        return {"block": self.block}

    def times(self, rows: Tensor, transposed: bool = False) -> Tensor:
        Q = skew(self.q, self.block)
        R = cayley(Q) if self.terms is None else cayley_neumann(-Q, self.terms)
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

    kinds: ClassVar[tuple[str, ...]] = LINEAR_KINDS
    peft: ClassVar[PeftFormat | None] = PeftFormat(
        "OFT", {"q": "oft_R.weight"},
        ("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "block_share", "coft", "eps", "module_dropout"),
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"block": block_size(target, self.block)}

    def build(self, target: Target, layout: Layout, shared: nn.Module | None, generator: torch.Generator) -> OFTDelta:
        return OFTDelta(target, layout["block"], self.share, self.terms)

    def parameters(self, out_features: int, in_features: int) -> int:
        block = nearest_divisor(in_features, self.block) or 1
        return (1 if self.share else in_features // block) * block * (block - 1) // 2

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        series = (
            {"use_cayley_neumann": False}
            if self.terms is None
            else {"use_cayley_neumann": True, "num_cayley_neumann_terms": self.terms, "peft_version": "0.18.0"}
        )  # the series as since then
        return {"r": 0, "oft_block_size": self.block, "block_share": self.share, "coft": False, "module_dropout": 0.0, "bias": "none", **series}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[Self, dict[str, Layout]]:
        refuse_others(config, bias="none", coft=False)
        series = config["use_cayley_neumann"]
        if series and "peft_version" not in config:
            raise GraftError("the PEFT adapter was made before PEFT 0.18, when use_cayley_neumann meant another series; train it again.")
        blocks = {name: (1 + math.isqrt(1 + 8 * tensors["oft_R.weight"][1])) // 2 for name, tensors in shapes.items()}
        if config["r"] and len(set(blocks.values())) > 1:
            raise GraftError(f"the PEFT adapter has r = {config['r']} blocks in targets of different widths; give PEFT oft_block_size instead.")
        own = cls(
            block=config["oft_block_size"] or next(iter(blocks.values())), share=config["block_share"],
            terms=config["num_cayley_neumann_terms"] if series else None,
        )  # fmt: skip
        return own, {name: {"block": block} for name, block in blocks.items()}


catalogue.register(
    Method("oft", "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", "arXiv 2306.07280", "delta", "rotations of the inputs", OFT,
           random=False)
)  # fmt: skip
