"""Parameter groups of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn


def apart(groups: Sequence[dict[str, Any]], parameters: Iterable[nn.Parameter], **changes: Any) -> list[dict[str, Any]]:
    """``groups`` with ``parameters`` in groups of their own, which differ by ``changes`` (``lr=...``)."""
    chosen = {id(p) for p in parameters}
    split = [
        {**group, **(changes if inside else {}), "params": [p for p in group["params"] if (id(p) in chosen) == inside]}
        for group in groups
        for inside in (False, True)
    ]
    return [group for group in split if group["params"]]
