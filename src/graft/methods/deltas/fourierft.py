"""FourierFT: dW is the inverse Fourier transform of a sparse spectrum.

    dW = s Re(ifft2(F))        F [out, in] zero but for n entries at random places, values c [n] trained from 0

Gao et al., arXiv 2405.03003. All targets of one shape use the same places, drawn from one seed (as in the authors' code and in PEFT).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.methods.families.additive import Additive
from graft.methods.families.factored import PLAIN


class FourierFTDelta(Additive):
    """``c`` [n]: the spectrum at the flat ``places`` [n]."""

    not_saved = frozenset({"places"})
    places: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, count, (out_features, in_features) = float(layout["scale"]), layout["count"], self.target.shape
        size = out_features * in_features
        if not 1 <= count <= size:
            raise GraftError(f"count is {count}, but the spectrum of {self.target.name} is {out_features} x {in_features}: choose 1 to {size}.")
        self.c = nn.Parameter(torch.zeros(count, dtype=self.target.dtype))
        self.register_buffer("places", drawn(size, count, layout["seed"]))

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

    kinds = PLAIN
    delta = FourierFTDelta
    peft = PeftFormat(
        "FOURIERFT", {"c": "fourierft_spectrum"}, {"n_frequency": "count", "scaling": "scale", "random_loc_seed": "places_seed"},
        {"count": ("fourierft_spectrum", 0)}, {"n_frequency_pattern": "count"},
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"count": self.count, "scale": self.scale, "seed": self.places_seed}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.count


catalogue.register(
    Method("fourierft", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", "arXiv 2405.03003", "delta",
           "a sparse Fourier spectrum", FourierFT, random=False)
)  # fmt: skip
