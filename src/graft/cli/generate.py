"""graft generate"""

from __future__ import annotations

from typing import Annotated

import typer

from graft.cli import show


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Annotated[str | None, typer.Option(help="Base model. [default: the adapter's own, else smollm2]")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of an adapter.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say a prompt to a model, greedily, through its chat template.

    Example: graft generate "Name three colours." --model smollm2
    """
    from graft.models import load, load_with_adapter
    from graft.training.evaluate import generate as run_generate

    if adapter:
        attached, tokenizer = load_with_adapter(adapter, model, dtype=dtype)
        loaded = attached.model
    else:
        loaded, tokenizer = load(model or "smollm2", dtype=dtype, task="causal")
    said = run_generate(loaded, tokenizer, prompt, new_tokens)
    if json_:
        show.print_json({"prompt": prompt, "answer": said})
    else:
        print(said)
