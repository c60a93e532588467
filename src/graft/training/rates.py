"""The rates of matrix products on this machine: measured once, kept in the cache folder, used by the planner of ``kernels/plan.py``."""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from graft.core.storage import to_json, write_folder
from graft.kernels.plan import EXACT, SIDES, Rates, measure, use_rates
from graft.models import cache_folder

FILE = "rates.json"


def use_measured(dtype: torch.dtype, device: str = "cpu", before: Any = None) -> Rates | None:
    """Lets the planner choose by this machine's rates, which are measured if they were not yet; None for a dtype that has no choice.

    ``before`` are the values that a run began with: it must go on with the same choices to end with the same bits.
    """
    if dtype not in EXACT:
        return None
    key = _key(dtype, device)
    rates = _valid(before) or _valid(_kept().get(key))
    if rates is None:
        measured = measure(dtype, device)
        kept = _kept()  # again: another process may have measured meanwhile, and what the first found holds for all
        rates = _valid(kept.get(key)) or measured
        cache_folder().mkdir(parents=True, exist_ok=True)
        write_folder(cache_folder(), {FILE: to_json({**kept, key: rates.values})})
    use_rates(rates, dtype, device)
    return rates


def _key(dtype: torch.dtype, device: str) -> str:
    """What the rates depend on."""
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{device} {processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {str(dtype).removeprefix('torch.')}"


def _kept() -> dict[str, Any]:
    try:
        kept = json.loads((cache_folder() / FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _valid(values: Any) -> Rates | None:
    if not isinstance(values, list) or len(values) != len(SIDES):
        return None
    return Rates(tuple(map(float, values))) if all(isinstance(v, (int, float)) and 0 < v < math.inf for v in values) else None
