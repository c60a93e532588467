"""Writes docs/methods.md from the catalogue; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import graft

PAGE = Path(__file__).with_name("methods.md")


def page() -> str:
    """The whole page as Markdown."""
    rows = list(graft.methods())
    lines = [
        "# Methods",
        "",
        "Generated from the catalogue by `make docs`; do not edit. `parameters` is for one 576 x 576 map with the defaults.",
        "",
        "| method | axis | what it does | parts | merge | needs | parameters | PEFT | paper |",
        "| --- | --- | --- | --- | --- | --- | ---: | --- | --- |",
    ]
    for row in rows:
        parts = " + ".join(part.__name__ for part in row.parts)
        peft = row.delta.peft.type if row.delta.peft else "-"
        cells = (
            f"[{row.name}](#{row.name})",
            row.axis,
            row.summary,
            parts,
            row.mergeable,
            row.needs or "-",
            f"{row.cost(576, 576):,}",
            peft,
            row.paper,
        )
        lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        lines += ["", f"## {row.name}", "", f"{row.title} ({row.paper}). Targets by default: `{row.default_targets}`.", ""]
        lines += ["| option | type | default | unit | paper | meaning |", "| --- | --- | --- | --- | --- | --- |"]
        for o in row.options():
            default = "none" if o.default is None else str(o.default).lower() if isinstance(o.default, bool) else o.default
            cells = (f"`{o.name}`", o.type.replace(" | ", ", "), f"`{default}`", o.unit or "-", o.paper or "-", o.help)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.is_file() and PAGE.read_text() == page() else f"{PAGE.name} is out of date; run `make docs`.")
    PAGE.write_text(page())
