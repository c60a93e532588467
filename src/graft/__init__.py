"""Graft: adapt pretrained models, with every method as a small composable piece.

model, tokenizer = graft.load("smollm2")
adapter = graft.attach(model, "lora", rank=8)
optimizer = adapter.optimizer(lr=2e-4, total_steps=100)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import graft.methods  # noqa: F401  fills the catalogue
from graft.core.adapter import Adapter, MergeReport, adapters_of, attach, detach, switch
from graft.core.calibration import Calibration
from graft.core.callback import Callback
from graft.core.catalogue import Catalogue, catalogue
from graft.core.delta import Part, lora_factors
from graft.core.errors import GraftError, NotMergeable
from graft.core.storage import load_adapter
from graft.models import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from graft.training.fuse import Fused


def fuse(model: PreTrainedModel) -> Fused:
    """Runs the frozen parts of a model by fused kernels, for faster and smaller training steps; see :mod:`graft.training.fuse`."""
    from graft.training.fuse import fuse

    return fuse(model)


def methods() -> Catalogue:
    """The catalogue of all methods: iterate over its rows, or take one by name: ``graft.methods()["lora"].cost(out, in)``."""
    return catalogue


def __getattr__(name: str) -> type[Part]:
    """The parts to compose with, ``graft.LoRA``, ``graft.EVA`` and so on, come from the catalogue."""
    try:
        return catalogue.part(name)
    except GraftError as error:
        raise AttributeError(str(error)) from None


__all__ = [
    "Adapter", "Calibration", "Callback", "Catalogue", "GraftError", "MergeReport", "NotMergeable", "adapters_of", "attach", "detach",
    "fuse", "load", "load_adapter", "lora_factors", "methods", "switch",
]  # fmt: skip
