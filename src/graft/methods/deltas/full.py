"""Full fine-tuning: a trainable copy of the target's own weight and bias. The baseline, and what weight optimisers act on.

    W' = the copy        W [out, in] stays as it is

Weights that the base model shares between modules (tied embeddings) are copied once and stay tied. With ``keep_base=False``
the copy takes over the base's storage: half the memory, and detaching reads the weights from the model's files again.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from graft.core.catalogue import Method, catalogue
from graft.core.config import option
from graft.core.delta import Delta, DeltaConfig, Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat
from graft.core.target import KINDS, Target

if TYPE_CHECKING:
    from graft.core.adapter import Adapter


class Copies(nn.Module):
    """The copy of each base parameter, so that a parameter that two targets share is copied once."""

    def __init__(self, keep_base: bool):
        super().__init__()
        self.keep_base = keep_base
        # weak, so that a base that is split over processes is not kept whole; in lists: the deltas own the copies, not this module
        self.known: MutableMapping[Tensor, list[nn.Parameter]] = WeakTensorKeyDictionary()

    def of(self, base: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        if base not in self.known:
            values = base.detach().to(dtype, copy=True) if self.keep_base else base.detach()
            self.known[base] = [nn.Parameter(values)]
        return self.known[base][0]


class FullDelta(Delta):
    """Runs a copy of the module; fp32 beside a low-precision base, so that small steps are not rounded away."""

    shared: Copies

    def make(self, layout: Layout, generator: torch.Generator) -> None:
        target, self.copy = self.target, self.target.clone_module()
        dtype = target.dtype if self.shared.keep_base else target.weight().dtype
        for name, base in target.module.named_parameters(recurse=False):
            setattr(self.copy, name, self.shared.of(base, dtype))

    def weight(self) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.copy, "bias", None)
        return self.target.view(self.copy.weight).to(self.target.dtype), bias  # type: ignore[arg-type]

    def file_key(self, key: str, peft: PeftFormat | None) -> str:
        return key.removeprefix("copy.")  # what PEFT calls a module of modules_to_save

    def forward(self, x: Tensor) -> Tensor:
        if self.target.kind == "norm":
            y: Tensor = self.copy(x)
            return y.to(x.dtype)
        return super().forward(x)


@dataclass(frozen=True, kw_only=True)
class Full(DeltaConfig):
    """Hyper-parameters of full fine-tuning."""

    keep_base: bool = option(True, "keep the base weights in memory beside the trained copy")

    kinds = KINDS
    delta = FullDelta

    @property
    def keeps_base(self) -> bool:
        return self.keep_base

    def shared(self, targets: Sequence[Target], seed: int) -> nn.Module:
        return Copies(self.keep_base)

    def parameters(self, out_features: int, in_features: int) -> int:
        return out_features * in_features

    def total(self, targets: Sequence[Target]) -> int:
        """Counts biases too, and tied weights once."""
        return sum(p.numel() for p in {p for target in targets for p in target.module.parameters(recurse=False)})

    def release(self, adapter: Adapter) -> None:
        if self.keep_base:
            return
        reload = getattr(adapter.model, "graft_reload", None)
        if reload is None:
            raise GraftError("the base weights were given up (keep_base=False) and the model was not made by graft.load(); load it again.")
        fresh = dict(reload().named_parameters())
        with torch.no_grad():
            for name, parameter in adapter.model.named_parameters():
                parameter.copy_(fresh[name])


catalogue.register(Method("full", "Full fine-tuning", "baseline", "delta", "trains the weights themselves", Full, random=False))
