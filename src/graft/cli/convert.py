"""graft convert"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from graft.cli import show


class Form(StrEnum):
    peft = "peft"
    lora = "lora"
    merged = "merged"


def convert(
    adapter: Annotated[str, typer.Argument(help="Folder of the adapter.")],
    to: Annotated[Form, typer.Option(help="peft: PEFT's own keys alone; lora: a plain LoRA that every reader understands; merged: a new model.")],
    output: Annotated[str | None, typer.Option(help="Folder to write. [default: DIR-peft, DIR-lora or DIR-merged]")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the LoRA, at most. [default: the smallest within --tolerance]")] = None,
    tolerance: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Relative error that a LoRA's update may have. [default: 0]")] = None,
    model: Annotated[str | None, typer.Option(help="Base model. [default: the adapter's own]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of a merged model: float32 or bfloat16. [default: float32]")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter in another form, with the error that the form costs.

    Example: graft convert runs/reviews --to lora --tolerance 0.05
    """
    from graft.adapters.export import save_as_lora, save_as_peft
    from graft.cli.merge import merge
    from graft.core.errors import GraftError
    from graft.models import load_with_adapter

    for name, value, form in (("rank", rank, Form.lora), ("tolerance", tolerance, Form.lora), ("dtype", dtype, Form.merged)):
        if value is not None and to is not form:
            raise GraftError(f"--{name} is for --to {form.value}, and this is --to {to.value}; leave it out.")
    output = output or f"{adapter.rstrip('/')}-{to.value}"
    if to is Form.merged:
        merge(adapter, output, model, dtype or "float32", json_)
        return
    attached, _ = load_with_adapter(adapter, model)
    if to is Form.peft:
        save_as_peft(attached, output)
        said = {"output": output, "rank": None, "errors": {}}
    else:
        with show.progress("factoring") as advance:
            report = save_as_lora(attached, output, rank=rank, tolerance=tolerance or 0.0, progress=advance)
        said = {"output": output, "rank": report.rank, "errors": report.errors}
    if json_:
        show.print_json(said)
    elif to is Form.peft:
        show.out.print(f"Wrote {output} in PEFT's form.")
    else:
        worst = max(report.errors.items(), key=lambda item: item[1])
        show.out.print(f"Wrote {output}: a LoRA of rank {report.rank}, off by at most {worst[1]:.2g} of the update, at {worst[0]}.")
