"""graft merge"""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli import show


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.")],
    output: Annotated[str, typer.Option(help="Folder for the merged model.")],
    model: Annotated[str | None, typer.Option(help="Base model. [default: the adapter's own]")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the merged model: float32 or bfloat16.")] = "float32",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a new model with the adapter baked in; the base's files stay as they are.

    Example: graft merge runs/reviews --output reviews-model
    """
    from graft.adapters.export import save_merged
    from graft.models import load_with_adapter

    attached, tokenizer = load_with_adapter(adapter, model, dtype=dtype)
    report = save_merged(attached, output, tokenizer)
    where, lost = report.worst
    if json_:
        show.print_json({"output": output, "targets": len(report.lost), "lost": report.lost})
        return
    show.out.print(f"Merged {len(report.lost)} targets into {output}. Rounding to {dtype} lost at most {lost:.2g} of an update, at {where}.")
    if lost > 0.1:
        show.out.print("That is a visible share of what was learned; --dtype float32 keeps it.")
