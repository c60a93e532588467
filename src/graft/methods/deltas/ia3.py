"""(IA)3: a trained gain on every output of a map, or on every input of an MLP's way down.

    W' = diag(g) W,  b' = g b        g [out] on the outputs
    W' = W diag(g),  b' = b          g [in] on the inputs: the activations between an MLP's two layers      g = 1 at the start

Liu et al., arXiv 2205.05638. The paper adapts keys, values and the way down (``targets=["k", "v", "down"]``). Convolutions have one gain a
channel. PEFT's ``feedforward_modules`` are the maps with gains on their inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.peft import PeftFormat
from graft.core.target import LINEAR_KINDS, Target

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class IA3Delta(Delta):
    """``gains`` [channels in] or [channels out]."""

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        self.inputs: bool = layout["inputs"]
        self.gains = nn.Parameter(torch.ones(channels(self.target, self.inputs), dtype=self.target.dtype))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        W, bias = self.target.weight().to(self.gains.dtype), self.target.bias
        if not self.inputs:
            return W * self.gains[:, None], None if bias is None else bias * self.gains
        groups = getattr(self.target.module, "groups", 1)  # of a convolution: each reads channels of its own
        kernels = W.reshape(groups, len(W) // groups, len(self.gains) // groups, -1)
        return (kernels * self.gains.view(groups, 1, -1, 1)).reshape(W.shape), bias

    def forward(self, x: Tensor) -> Tensor:
        target = self.target
        if self.inputs:
            return target.apply(target.scale(x, self.gains), target.weight(), target.bias)
        return target.scale(target.apply(x, target.weight(), target.bias), self.gains)

    def exported(self) -> dict[str, Tensor]:
        shape = [1, -1, 1, 1] if self.target.kind == "conv2d" else [1, -1] if self.inputs else [-1, 1]  # PEFT's
        return {"gains": self.gains.detach().view(shape)}

    def restore(self, exported: Mapping[str, Tensor]) -> None:
        self.gains.copy_(exported["gains"].flatten())


def channels(target: Target, inputs: bool) -> int:
    """Inputs or outputs of a target, channels of a convolution."""
    return int(getattr(target.module, "in_channels", target.shape[1])) if inputs else target.shape[0]


@dataclass(frozen=True, kw_only=True)
class IA3(DeltaConfig):
    """Hyper-parameters of (IA)3."""

    inputs: Literal["down", "all", "none"] = option("down", "which maps have the gains on their inputs; the others have them on their outputs")

    kinds = LINEAR_KINDS
    delta = IA3Delta
    peft = PeftFormat("IA3", {"gains": "ia3_l"}, others=("feedforward_modules", "init_ia3_weights"))

    def on_inputs(self, role: str) -> bool:
        return self.inputs == "all" or self.inputs == role

    def layout_at(self, target: Target) -> Layout:
        return {"inputs": self.on_inputs(target.role)}

    def parameters(self, out_features: int, in_features: int) -> int:
        """At a way down; elsewhere see :meth:`total`."""
        return in_features if self.on_inputs("down") else out_features

    def total(self, targets: Sequence[Target]) -> int:
        return sum(channels(target, self.on_inputs(target.role)) for target in targets)

    def to_peft(self, adapter: Adapter) -> dict[str, Any]:
        names = [name for name, layout in adapter.layouts.items() if layout["inputs"]]
        return {"feedforward_modules": "|".join(map(re.escape, names))}  # a pattern: as a list it would have to be among target_modules

    def layout_from_peft(self, target: Target, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
        modules = config.get("feedforward_modules") or []  # PEFT's rule: a pattern, or ends of names
        return {"inputs": bool(re.fullmatch(modules, target.name)) if isinstance(modules, str) else target.name.endswith(tuple(modules))}


catalogue.register(
    Method("ia3", "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", "arXiv 2205.05638", "delta",
           "gains on activations", IA3, random=False)
)  # fmt: skip
