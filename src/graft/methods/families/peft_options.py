"""Options of PEFT's that change what an adapter computes and that Graft does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graft.core.errors import GraftError


def refuse_others(config: Mapping[str, Any], **plain: Any) -> None:
    """Raises :class:`GraftError` where an option of a PEFT config is there and is not the one value that Graft has."""
    for key, value in plain.items():
        if config.get(key, value) != value:
            raise GraftError(f"the PEFT adapter has {key} = {config[key]!r}, and Graft has {value!r} only; make it again in PEFT with that.")
