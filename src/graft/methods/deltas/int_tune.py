"""IntTune: of NyströmLoRA's three factors only the core is trained.

    dW = s B0 (N - N0) A0,    B0 = W[:, :r],  A0 = W[:r, :] frozen,  N [r, r] trained from N0

Guo et al., NLoRA, arXiv 2502.14482.
"""

from __future__ import annotations

from dataclasses import dataclass

from graft.core.catalogue import Method, catalogue
from graft.methods.deltas.nystrom_lora import NystromLoRA


@dataclass(frozen=True, kw_only=True)
class IntTune(NystromLoRA):
    """Hyper-parameters of IntTune."""

    trained = "N"


catalogue.register(
    Method("int-tune", "IntermediateTune (NLoRA)", "arXiv 2502.14482", "delta", "only the core between blocks of W", IntTune, random=False)
)
