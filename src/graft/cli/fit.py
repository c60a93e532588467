"""graft fit"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graft.cli import show


def fit(
    data: Annotated[str | None, typer.Argument(help="JSON lines, CSV or Parquet: prompt/answer, text/label, or text.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Packaged model (smollm2, minilm), folder or hub id. [default: smollm2]")] = None,
    method: Annotated[str | None, typer.Option(help="A method of `graft methods`. [default: lora]")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A hyper-parameter of the method, name=value; may be repeated.")] = None,
    targets: Annotated[list[str] | None, typer.Option(help="Role name or glob pattern; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser updates. [default: 100]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward pass. [default: 8]")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes an update. [default: 1]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row at most. [default: 512]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. [default: 2e-4]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: float32]")] = None,
    shard: Annotated[bool | None, typer.Option("--shard", help="Shard the frozen base over processes (FSDP2).", show_default=False)] = None,
    pack: Annotated[
        bool | None, typer.Option(help="Several rows of a batch in one. [default: where the model can tell them apart]", show_default=False)
    ] = None,
    bucket: Annotated[bool | None, typer.Option("--bucket", help="Batches of rows of similar length: less padding.", show_default=False)] = None,
    fuse: Annotated[bool | None, typer.Option(help="Run the frozen parts by fused kernels. [default: yes]", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. [default: 0]")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Updates between checkpoints. [default: a tenth of the run]")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the adapter, run.json and metrics.jsonl.")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with these settings and more; options given here win.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print run.json as one line at the end.")] = False,
) -> None:
    """Fine-tune a model on a data file.

    Example: graft fit reviews.jsonl --model smollm2 --method lora --set rank=8 --steps 100 --output runs/reviews
    """
    from graft.training import distributed
    from graft.training.config import FitConfig, read_yaml
    from graft.training.fit import fit as run_fit

    sharded_by_launcher = distributed.start()
    given: dict[str, Any] = {
        "data": data, "model": model, "method": method, "targets": targets or None, "steps": steps, "batch_size": batch_size,
        "accumulation": accumulation, "max_length": max_length, "lr": lr, "dtype": dtype, "shard": shard or sharded_by_launcher or None,
        "pack": pack, "bucket": bucket, "fuse": fuse, "seed": seed,
        "checkpoint_every": checkpoint_every, "output": output,
    }  # fmt: skip
    with distributed.together():
        values = read_yaml(config) if config else {}
        values |= {name: value for name, value in given.items() if value is not None}
        if set_:
            values["settings"] = {**values.get("settings", {}), **show.settings(set_)}
        checked = FitConfig.make(values)
    with show.progress(f"{checked.method} on {checked.model}") as advance:
        run = run_fit(checked, resume=resume, progress=advance)
    first = distributed.rank() == 0
    distributed.stop()
    if not first:
        return
    if json_:
        show.print_json(run)
        return
    show.print_table(f"{checked.method} on {checked.data}", ("what", "value"), summary(run))
    show.out.print(f"The adapter lies in {checked.output}. Next: graft eval DATA --adapter {checked.output}")


def summary(run: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a run for a reader."""
    return [
        ("loss at the last update", f"{run['loss']:.4f}"),
        ("trainable parameters", f"{run['trainable_parameters']:,}"),
        ("adapter", show.size(run["adapter_bytes"])),
        ("tokens per second", f"{run['tokens_per_second']:.0f}" if run["tokens_per_second"] else "-"),
        ("seconds an update (median)", f"{run['step_seconds']:.3f}" if run["step_seconds"] else "-"),
        ("peak memory", show.size(run["peak_memory_bytes"])),
        ("rows shortened to max_length", f"{run['rows_shortened']} of {run['rows']}"),
    ]
