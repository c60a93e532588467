"""FourierFT: dW is the inverse Fourier transform of a sparse spectrum.

    dW = s Re(ifft2(F))        F [out, in] zero but for n entries at random places, values c [n] trained from 0

Gao et al., arXiv 2405.03003. All targets of one shape use the same places, drawn from one seed (as in the authors' code and in PEFT).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout, PeftFormat
from graft.core.errors import GraftError
from graft.core.storage import patterns
from graft.core.target import Target
from graft.methods.families.additive import Additive
from graft.methods.families.factored import PLAIN

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class FourierFTDelta(Additive):
    """``c`` [n]: the spectrum at the flat ``places`` [n]."""

    not_saved = frozenset({"places"})
    places: Tensor

    def __init__(self, target: Target, layout: Layout):
        super().__init__(target)
        self.scale, self.seed = float(layout["scale"]), layout["seed"]
        count, size = layout["count"], target.shape[0] * target.shape[1]
        if not 1 <= count <= size:
            raise GraftError(f"count is {count}, but the spectrum of {target.name} is {target.shape[0]} x {target.shape[1]}: choose 1 to {size}.")
        self.c = nn.Parameter(torch.zeros(count, dtype=target.dtype))
        self.register_buffer("places", drawn(size, count, self.seed))

    @property
    def layout(self) -> Layout:
        return {"count": len(self.c), "scale": self.scale, "seed": self.seed}

    def update(self) -> Tensor:
        out_features, in_features = self.target.shape
        spectrum = self.c.new_zeros(out_features * in_features).index_put((self.places,), self.c)
        update: Tensor = torch.fft.ifft2(spectrum.view(out_features, in_features)).real * self.scale
        return update


@lru_cache(maxsize=64)
def drawn(size: int, count: int, seed: int) -> Tensor:
    """``count`` of ``size`` places, as PEFT draws them."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


@dataclass(frozen=True, kw_only=True)
class FourierFT(DeltaConfig):
    """Hyper-parameters of FourierFT."""

    count: int = option(1000, "frequencies n at each target", paper="200..1000", low=1)
    scale: float = option(150.0, "scale s of the update", paper="100..300")
    places_seed: int = option(777, "what the places are drawn from", low=0)

    kinds: ClassVar[tuple[str, ...]] = PLAIN
    peft: ClassVar[PeftFormat | None] = PeftFormat(
        "FOURIERFT", {"c": "fourierft_spectrum"}, ("n_frequency", "n_frequency_pattern", "scaling", "random_loc_seed")
    )

    def layout_at(self, target: Target) -> Layout:
        return {"count": self.count, "scale": self.scale, "seed": self.places_seed}

    def build(self, target: Target, layout: Layout, shared: nn.Module | None, generator: torch.Generator) -> FourierFTDelta:
        return FourierFTDelta(target, layout)

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.count

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        layouts = {name: delta.layout for name, delta in adapter.deltas.items() if isinstance(delta, FourierFTDelta)}
        count, pattern = patterns({name: layout["count"] for name, layout in layouts.items()})
        return {"n_frequency": count, "n_frequency_pattern": pattern, "scaling": self.scale, "random_loc_seed": self.places_seed}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[Self, dict[str, Layout]]:
        own = cls(count=config["n_frequency"], scale=config["scaling"], places_seed=config["random_loc_seed"])
        layout = {"scale": own.scale, "seed": own.places_seed}
        return own, {name: {"count": tensors["fourierft_spectrum"][0], **layout} for name, tensors in shapes.items()}


catalogue.register(
    Method("fourierft", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "arXiv 2405.03003", "delta",
           "a sparse Fourier spectrum", FourierFT, random=False)
)  # fmt: skip
