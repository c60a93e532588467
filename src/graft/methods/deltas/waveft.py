"""WaveFT: dW is the inverse wavelet transform of a few coefficients.

    dW = s idwt2(C)        C [out + p, in + p] zero but for n entries at random places, values c [n] trained from 0

One level of a two-dimensional wavelet transform: C's quarters are the approximation, two details and the diagonal detail, each drawn out by
a factor of two with the wavelet's filters (length p + 2) and added; C is padded, so that the borders, where filters would end, fall off.

Bilican et al., arXiv 2505.12532. Places, padding and pairing of quarters with filters are PEFT's: the upper right quarter is high-pass from
row to row and low-pass from column to column. Not offered are its coif4 and coif5, whose filters are misprinted there (0.21.2: coif4 differs
from the wavelet's by up to 0.012, coif5 has 48 taps of 30), and ``use_idwt=False`` (entries without a transform; see SHiRA).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import Target
from graft.methods.families.additive import Additive
from graft.methods.families.factored import PLAIN
from graft.methods.families.wavelets import pywavelets

Wavelet = Literal[
    "db1", "db2", "db3", "db4", "db5", "db6", "db7", "db8", "db9", "db10", "sym2", "sym3", "sym4", "sym5", "sym6", "sym7", "sym8", "sym9", "sym10",
    "coif1", "coif2", "coif3",
]  # fmt: skip


class WaveFTDelta(Additive):
    """``c`` [n]: the coefficients at ``places`` [n] of the four quarters, flat; ``filters`` [4, 1, p + 2, p + 2] draw the quarters out."""

    not_saved = frozenset({"places", "filters"})
    config: WaveFT
    places: Tensor
    filters: Tensor

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.scale, count, (out_features, in_features) = float(layout["scale"]), layout["count"], self.target.shape
        if not 1 <= count <= out_features * in_features:
            raise GraftError(
                f"count is {count}, but {self.target.name} is {out_features} x {in_features}: choose 1 to {out_features * in_features}, "
                "or other targets."
            )
        low, high = taps(self.config.wavelet)
        filters = torch.stack([torch.outer(down, across) for across in (low, high) for down in (low, high)])
        places = torch.randperm(out_features * in_features, generator=torch.Generator().manual_seed(layout["seed"]))[:count]
        self.quarter = height, width = [(size + len(low) - 1) // 2 for size in self.target.shape]  # half of the padded sides, made even
        rows = places // in_features + (2 * height - out_features) // 2  # the places lie in the middle of C
        columns = places % in_features + (2 * width - in_features) // 2
        places = ((2 * (rows // height) + columns // width) * height + rows % height) * width + columns % width
        self.c = nn.Parameter(torch.zeros(count, dtype=self.target.dtype))
        self.register_buffer("places", places)
        self.register_buffer("filters", filters[:, None].to(self.target.dtype))

    def update(self) -> Tensor:
        (out_features, in_features), cut = self.target.shape, self.filters.shape[-1] - 2
        quarters = self.c.new_zeros(4 * math.prod(self.quarter)).index_put((self.places,), self.c).view(1, 4, *self.quarter)
        plane: Tensor = F.conv_transpose2d(quarters, self.filters, stride=2)[0, 0]
        return plane[cut : cut + out_features, cut : cut + in_features] * self.scale


def taps(wavelet: str) -> tuple[Tensor, Tensor]:
    """The low-pass and the high-pass filter that synthesise, fp64."""
    own = pywavelets().Wavelet(wavelet)
    return torch.tensor(own.rec_lo, dtype=torch.float64), torch.tensor(own.rec_hi, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class WaveFT(DeltaConfig):
    """Hyper-parameters of WaveFT."""

    count: int = option(2592, "coefficients n at each target", paper="2592 (SDXL)", low=1)
    scale: float = option(25.0, "scale s of the update", paper="25")
    wavelet: Wavelet = option("db1", "the wavelet; db1 is Haar's", paper="db1")  # noqa: RUF009 - a Literal by its name
    places_seed: int = option(777, "what the places are drawn from", low=0)

    kinds = PLAIN
    delta = WaveFTDelta
    peft = PeftFormat(
        "WAVEFT", {"c": "waveft_spectrum"},
        {"n_frequency": "count", "scaling": "scale", "wavelet_family": "wavelet", "random_loc_seed": "places_seed"},
        {"count": ("waveft_spectrum", 0)}, {"n_frequency_pattern": "count"}, fixed={"use_idwt": True}, unread={"proportional_parameters": False},
    )  # fmt: skip

    def layout_at(self, target: Target) -> Layout:
        return {"count": self.count, "scale": self.scale, "seed": self.places_seed}

    def parameters(self, out_features: int, in_features: int) -> int:
        return self.count


catalogue.register(
    Method("waveft", "WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", "arXiv 2505.12532", "delta",
           "a few wavelet coefficients", WaveFT, random=False)
)  # fmt: skip
