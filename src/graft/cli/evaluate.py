"""graft eval"""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli import show


def evaluate(
    data: Annotated[str, typer.Argument(help="JSON lines, CSV or Parquet; a folder stands for its test file.")],
    model: Annotated[str | None, typer.Option(help="Base model. [default: the adapter's own, else smollm2]")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a row at most.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Rows a forward pass.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure a model, with or without an adapter: accuracy on answers and labels, perplexity on text.

    Example: graft eval test.jsonl --adapter runs/reviews
    """
    from graft.core.errors import GraftError
    from graft.data.reading import read
    from graft.models import load, load_with_adapter
    from graft.training.evaluate import evaluate as run_evaluate

    table = read(data, split="test")
    if adapter:
        attached, tokenizer = load_with_adapter(adapter, model, dtype=dtype)
        loaded = attached.model
    else:
        if table.kind == "labels" and model is None:
            raise GraftError("rows with labels need a model with a trained head; pass --adapter, or --model with its folder.")
        loaded, tokenizer = load(model or "smollm2", dtype=dtype, task="classification" if table.kind == "labels" else "causal")
    with show.progress("evaluating") as advance:
        result = run_evaluate(loaded, tokenizer, table, max_length=max_length, batch_size=batch_size, progress=advance)
    if json_:
        show.print_json({**result.metrics, "rule": result.rule, "data": str(table.path), "model": model, "adapter": adapter})
        return
    show.print_table(str(table.path), ("metric", "value"), [(name, f"{value:.4g}") for name, value in result.metrics.items()])
    show.out.print(f"Rule: {result.rule}.")
