"""Low-rank adapters in the words of PEFT's LoRA config, both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graft.core.delta import Layout
from graft.core.errors import GraftError
from graft.core.peft import PeftFormat, by_pattern

FORMAT = PeftFormat(
    "LORA", {"A": "lora_A.weight", "B": "lora_B.weight"}, {"r": "rank", "lora_dropout": "dropout"}, alpha="lora_alpha",
    unread={"use_rslora": False, "use_dora": False, "bias": "none"},  # but by :func:`read`
)  # fmt: skip


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA's options from a PEFT config. Raises :class:`GraftError` where the adapter trained or changed the base itself."""
    start = config.get("init_lora_weights", True)
    changes_base = isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva")
    if config.get("bias", "none") != "none" or config.get("lora_bias") or changes_base:
        seen = ", ".join(f"{key}={config.get(key)!r}" for key in ("bias", "lora_bias", "init_lora_weights"))
        raise GraftError(f"the PEFT adapter uses {seen}, which train or change the base; export it from PEFT as a plain LoRA first.")
    options = {"rank": config.get("r", 8), "alpha": config.get("lora_alpha", 8), "dropout": config.get("lora_dropout", 0.0)}
    return {**options, "rslora": bool(config.get("use_rslora"))}


def layout(name: str, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Layout:
    """The layout of one target from a PEFT config and the shapes of the target's tensors."""
    rank = next(shape for key, shape in shapes.items() if key.startswith(("lora_A", "lora_embedding_A")))[0]
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return {"rank": rank, "scale": alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), "frozen": 0, "inactive": []}
