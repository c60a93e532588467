"""graft quickstart"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from graft.cli import show


def quickstart(
    output: Annotated[str, typer.Option(help="Folder to work in; an earlier quickstart there is replaced.")] = "quickstart",
    fast: Annotated[bool, typer.Option("--fast", help="Little data and few updates: under 90 seconds.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16 (faster where the processor has it).")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object on the last line.")] = False,
) -> None:
    """The whole story on a real model and real reviews: measure, fine-tune, measure again, merge, save, check with PEFT.

    Example: graft quickstart --fast
    """
    from graft.recipes.quickstart import quickstart as run

    began = time.perf_counter()
    figures = run(output, show.progress, fast=fast, dtype=dtype, seed=seed)
    rows = [
        ("accuracy before", f"{figures['accuracy_before']:.1%} of {figures['test_rows']} held-out reviews"),
        ("accuracy after", f"{figures['accuracy_after']:.1%}"),
        ("trainable parameters", f"{figures['trainable_parameters']:,}"),
        ("adapter", show.size(figures["adapter_bytes"])),
        ("tokens per second, training", f"{figures['tokens_per_second']:.0f}"),
        ("peak memory", show.size(figures["peak_memory_bytes"])),
        ("merged model answers the same", _word(figures["merged_agrees"])),
        ("PEFT computes the same", _word(figures["peft_agrees"])),
        ("time", f"{time.perf_counter() - began:.0f} s"),
    ]
    show.print_table("LoRA, SmolLM2-135M-Instruct, film reviews", ("what", "value"), rows)
    show.out.print(f"Adapter: {figures['adapter']}   data: {figures['data']}   figures: {output}/quickstart.json")
    show.out.print(f'Try: graft generate "Is this movie review good or bad? Answer with one word. Review: a joy" --adapter {figures["adapter"]}')
    if json_:
        show.print_json(figures)
    if figures["merged_agrees"] is False or figures["peft_agrees"] is False:
        raise typer.Exit(1)


def _word(agrees: bool | None) -> str:
    return {True: "yes", False: "NO", None: "not checked: peft is not installed"}[agrees]
