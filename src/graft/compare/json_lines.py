"""JSON lines, as every file of a comparison has them: written whole, or growing by a line at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def to_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """One object a line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def read_lines(path: Path, growing: bool = False) -> list[dict[str, Any]]:
    """The objects in a file, none where there is no file; of a ``growing`` one the lines that are whole."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in (text[: text.rfind("\n") + 1] if growing else text).split("\n") if line]
