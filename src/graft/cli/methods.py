"""graft methods"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graft.cli import show


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, to see its hyper-parameters.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Count the parameters on this model's targets.")] = None,
    axis: Annotated[str | None, typer.Option(help="Only one axis: delta, init, allocation or optimiser.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the methods, or the hyper-parameters of one.

    Example: graft methods lora
    """
    from graft.core.catalogue import catalogue
    from graft.core.errors import GraftError, nearest

    if name:
        row = catalogue[name]
        options = [{"name": o.name, "type": o.type, "default": o.default, "unit": o.unit, "paper": o.paper, "help": o.help} for o in row.options()]
        if json_:
            show.print_json({**_fields(row), "options": options})
            return
        show.out.print(
            f"{row.name}: {row.title} ({row.paper})\n{row.summary}. Axis: {row.axis}; mergeable: {row.mergeable}; needs: {row.needs or 'nothing'}."
        )
        show.print_table(
            "Options, for --set name=value", ("name", "type", "default", "unit", "paper's range", "meaning"), [tuple(o.values()) for o in options]
        )
        return
    rows = [row for row in catalogue if axis in (None, row.axis)]
    if not rows:
        raise GraftError(f"no method lies on the axis {axis!r}; {nearest(str(axis), {row.axis for row in catalogue})}")
    counts = _counts(rows, model) if model else {}
    if json_:
        show.print_json([{**_fields(row), **({"parameters": counts[row.name]} if model else {})} for row in rows])
        return
    columns = ("method", "axis", "what it does", "mergeable", "paper", *(("parameters",) if model else ()))
    cells = [(r.name, r.axis, r.summary, r.mergeable, r.paper, *((f"{counts[r.name]:,}",) if model else ())) for r in rows]
    show.print_table("Methods" + (f", with parameters on {model}" if model else ""), columns, cells, right=("parameters",))


def _fields(row: Any) -> dict[str, Any]:
    return {
        "name": row.name, "title": row.title, "paper": row.paper, "axis": row.axis, "summary": row.summary, "mergeable": row.mergeable,
        "starts_as_identity": row.starts_as_identity, "needs": row.needs, "targets": row.default_targets,
    }  # fmt: skip


def _counts(rows: list[Any], model: str) -> dict[str, int]:
    """Trainable parameters of each method with its defaults on its default targets of ``model``."""
    from graft.core.target import find_targets
    from graft.models import load

    loaded, _ = load(model)
    return {r.name: r.recipe().delta.total(find_targets(loaded, r.default_targets, r.delta.kinds)) for r in rows}
