"""Low-rank adapters in the words of PEFT's LoRA config, both ways.

PEFT recomputes each scale from alpha and rank, so alpha is written as scale * rank; a frozen start counts as ranks of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graft.core.delta import Layout
from graft.core.errors import GraftError
from graft.core.storage import patterns
from graft.methods.families.factored import LowRank

if TYPE_CHECKING:
    from graft.core.adapter import Adapter

OPTIONS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def write(adapter: Adapter, dropout: float, use_dora: bool) -> dict[str, Any]:
    """PEFT's keys for an adapter of :class:`LowRank` deltas."""
    layouts = {name: delta.layout for name, delta in adapter.deltas.items() if isinstance(delta, LowRank)}
    ranks = {name: layout["rank"] + layout["frozen"] for name, layout in layouts.items()}
    rank, rank_pattern = patterns(ranks)
    alpha, alpha_pattern = patterns({name: layout["scale"] * ranks[name] for name, layout in layouts.items()})
    return {
        "r": rank, "rank_pattern": rank_pattern, "lora_alpha": alpha, "alpha_pattern": alpha_pattern, "use_rslora": False,
        "use_dora": use_dora, "lora_dropout": dropout, "bias": "none",
    }  # fmt: skip


def read(config: Mapping[str, Any], shapes: Mapping[str, Mapping[str, Sequence[int]]]) -> tuple[dict[str, Any], dict[str, Layout]]:
    """LoRA's options and the layout of each target from a PEFT config and its tensors' shapes.

    Raises :class:`GraftError` where the adapter trained or changed the base itself.
    """
    start = config.get("init_lora_weights", True)
    changes_base = isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva")
    if config.get("bias", "none") != "none" or config.get("lora_bias") or changes_base:
        seen = ", ".join(f"{key}={config.get(key)!r}" for key in ("bias", "lora_bias", "init_lora_weights"))
        raise GraftError(f"the PEFT adapter uses {seen}, which train or change the base; export it from PEFT as a plain LoRA first.")
    layouts = {}
    for name, tensors in shapes.items():
        rank = next(shape for key, shape in tensors.items() if key.startswith(("lora_A", "lora_embedding_A")))[0]
        alpha = by_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha", 8))
        layouts[name] = {"rank": rank, "scale": alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), "frozen": 0, "inactive": []}
    options = {"rank": config.get("r", 8), "alpha": config.get("lora_alpha", 8), "dropout": config.get("lora_dropout", 0.0)}
    return {**options, "rslora": bool(config.get("use_rslora"))}, layouts


def by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, is the name or its end after a dot."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
