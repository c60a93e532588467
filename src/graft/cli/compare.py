"""graft compare"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table

from graft.cli import show


def compare(
    data: Annotated[str | None, typer.Argument(help="Folder with train and test files, or one file that is split.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="Packaged model (smollm2, minilm), folder or hub id. [default: smollm2]")] = None,
    methods: Annotated[str | None, typer.Option(help="Beside the baselines, with commas: dora,shira,lora:rank=16.")] = None,
    test: Annotated[str | None, typer.Option(help="Test file or folder, in place of the data's own.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="params=1% (each method as large as that allows) or minutes=30 (for all runs).")] = None,
    tune: Annotated[
        str | None, typer.Option(help="lr: the learning rate of each, on validation rows; none: --lrs gives the one. [default: lr]")
    ] = None,
    lrs: Annotated[str | None, typer.Option(help="Learning rates to try, with commas. [default: 1e-4,1e-3,1e-2]")] = None,
    refine: Annotated[bool | None, typer.Option(help="Try the rates around the best, too. [default: yes]", show_default=False)] = None,
    seeds: Annotated[int | None, typer.Option(help="Runs of each method with its learning rate. [default: 3]")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser updates of a run. [default: 100]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows a forward pass. [default: 8]")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a row at most. [default: 256]")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. [default: float32]")] = None,
    validation_rows: Annotated[int | None, typer.Option(help="Rows for choosing, at most. [default: 100]")] = None,
    test_rows: Annotated[int | None, typer.Option(help="Held-out rows, at most. [default: 500]")] = None,
    general: Annotated[str | None, typer.Option(help="Text for measuring what was forgotten. [default: a few pages of Graft's]")] = None,
    match: Annotated[
        str | None, typer.Option(help="A generated answer is right if: exact (same text), number (same last number). [default: exact]")
    ] = None,
    prune: Annotated[bool | None, typer.Option("--prune", help="Stop clearly losing runs early.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time, each with its share of the cores.", min=1)] = 1,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that does the runs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate time and memory of each method, by a few updates.")] = False,
    load: Annotated[list[str] | None, typer.Option(help="Put earlier comparisons together: --load DIR1 --load DIR2, or --load DIR1 DIR2.")] = None,
    config: Annotated[str | None, typer.Option(help="YAML file with these settings and more; options given here win.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the runs, results.jsonl, report.html and report.md.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the answer as one JSON object.")] = False,
) -> None:
    """Find out which method suits your data: every one under the same conditions, and an answer no finer than the evidence.

    A comparison that was stopped goes on when the same command is run again.

    Example: graft compare reviews/ --model smollm2 --methods dora,shira,galore --output compared
    """
    from graft.compare.answer import Answer
    from graft.compare.comparison import compare as run_comparison
    from graft.compare.comparison import prepare_comparison
    from graft.compare.config import CompareConfig
    from graft.compare.report import write_reports
    from graft.compare.results import together, write_together
    from graft.core.errors import GraftError
    from graft.data.reading import read
    from graft.training.config import read_yaml

    given: dict[str, Any] = {
        "data": data, "model": model, "methods": _list(methods), "test": test, "tune": tune, "lrs": _rates(lrs), "refine": refine,
        "seeds": seeds, "steps": steps, "batch_size": batch_size, "max_length": max_length, "dtype": dtype, "validation_rows": validation_rows,
        "test_rows": test_rows, "general": general, "match": match, "prune": prune, "output": output, **_budget(budget or []),
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if load:
        run = {"jobs": jobs != 1, "ray": ray is not None, "dry_run": dry_run, "config": config is not None}
        extra = sorted({*given, *(name for name, wanted in run.items() if wanted)} - {"output", "data"})
        if extra:
            raise GraftError(f"--load only puts earlier results together, so --{extra[0].replace('_', '-')} has no meaning; leave it out.")
        folders = [Path(each) for each in (*load, *([data] if data else []))]
        records, table = together(folders)
        folder = Path(output) if output else folders[0].with_name("+".join(each.name for each in folders))
        if folder.resolve() in [each.resolve() for each in folders]:
            raise GraftError(f"{folder} holds one of the comparisons; choose another --output for all of them together.")
        write_together(folder, records)
    else:
        if ray and jobs != 1:
            raise GraftError("--jobs is for this machine and --ray for a cluster, which knows its own size; give one of them.")
        if ray and (dry_run or "minutes" in given):
            raise GraftError("time is estimated on this machine, so --dry-run and --budget minutes say nothing about a --ray cluster; leave one out.")
        checked = CompareConfig.make({**(read_yaml(config) if config else {}), **given})
        with show.waiting("preparing") as told:
            comparison = prepare_comparison(checked, jobs, told)
        for note in comparison.splits.notes:
            show.err.print(note)
        if dry_run:
            _estimate(comparison, jobs, json_)
            return
        with _Live() as watch:
            records = run_comparison(comparison, _workers(jobs, ray), watch)
        folder, table = comparison.folder, read(comparison.splits.path("test"), kind=comparison.splits.kind)
    try:
        answer = Answer(records)
    except ValueError:
        failed = next((record for record in records if record["error"]), None)
        reason = f"the first said: {failed['error']}" if failed else "none has ended."
        raise GraftError(f"no run has finished, so there is nothing to compare; {reason}") from None
    write_reports(folder, answer, table)
    if json_:
        show.print_json(_as_json(answer, folder))
        return
    show.out.print(answer.text)
    columns = ("method", answer.measure, "verdict", "parameters", "memory", "s / update", "lr")
    rows = [
        (e.name, answer.span(e.quality), answer.verdict(e), f"{e.parameters:,}", show.size(e.memory_bytes),
         f"{e.step_seconds:.2f}" if e.step_seconds else "-", f"{e.lr:.1e}" if e.lr else "-")
        for e in answer.entries
    ]  # fmt: skip
    show.print_table(f"{len(answer.counting)} runs", columns, rows, right=("parameters", "memory", "s / update"))
    show.out.print(f"The report is {folder / 'report.html'}; every run is in {folder / 'results.jsonl'}.")


def _workers(jobs: int, ray: str | None) -> Any:
    from graft.compare.workers import LocalWorkers

    if ray is None:
        return LocalWorkers(jobs)
    from graft.compare.ray_workers import RayWorkers

    return RayWorkers(ray)


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _rates(text: str | None) -> list[float] | None:
    from graft.core.errors import GraftError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise GraftError(f"--lrs takes numbers with commas, such as 1e-4,1e-3, but got {text!r}.") from None


def _budget(texts: Sequence[str]) -> dict[str, float]:
    """``params=1%`` and ``minutes=30``."""
    from graft.core.errors import GraftError

    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            number = -1.0
        if name not in ("params", "minutes") or number <= 0 or (name == "minutes" and value.endswith("%")):
            raise GraftError(f"--budget takes params=1% or minutes=30, but got {text!r}.")
        found[name] = number
    return found


def _as_json(answer: Any, folder: Path) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "measure": answer.measure,
        "table": [{**vars(entry), "quality": vars(entry.quality), "verdict": answer.verdict(entry)} for entry in answer.entries],
        "failed": answer.failed,
        "report": str(folder / "report.html"),
        "results": str(folder / "results.jsonl"),
    }


def _estimate(comparison: Any, jobs: int, json_: bool) -> None:
    from graft.compare.comparison import estimates
    from graft.compare.estimate import total_seconds

    with show.waiting("trying") as told:
        found = estimates(comparison, jobs, told)
    total = total_seconds(comparison, found, jobs)
    rows = comparison.splits.rows
    described = {
        name: {"error": each} if isinstance(each, str) else {
            "runs": each.runs, "seconds": each.seconds(comparison.config.steps, rows["validation"], rows["test"]), "update_seconds": each.update,
            "memory_bytes": each.memory,
        }
        for name, each in found.items()
    }  # fmt: skip
    if json_:
        show.print_json({"methods": described, "seconds": total, "steps": comparison.config.steps})
        return
    lines = [
        (name, "-", "-", "-", each)
        if isinstance(each, str)
        else (name, each.runs, show.duration(described[name]["seconds"]), show.size(each.memory), f"{each.update:.2f} s an update")
        for name, each in found.items()
    ]
    show.print_table(
        f"estimated: {show.duration(total)} for everything", ("method", "runs", "time", "memory", "note"), lines, right=("runs", "time", "memory")
    )


class _Live:
    """The runs as a live table on stderr; where nobody looks, a line for each that ends."""

    def __init__(self) -> None:
        self.live = Live(console=show.err, refresh_per_second=2, transient=True) if show.err.is_terminal else None
        self.told: set[Any] = set()

    def __enter__(self) -> Any:
        if self.live:
            self.live.start()
        return self.update

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()

    def update(self, statuses: Sequence[Any]) -> None:
        if self.live:
            self.live.update(_status_table(statuses))
            return
        for status in statuses:
            if status.state != "running" and (status.run, status.state) not in self.told:
                self.told.add((status.run, status.state))
                show.err.print(f"{time.strftime('%H:%M:%S')} {status.run.folder}: {status.state}{f' ({status.note})' if status.note else ''}")


def _status_table(statuses: Sequence[Any]) -> Table:
    """The runs that are going on, and the last that ended."""
    ended = [status for status in statuses if status.state != "running"]
    table = Table(title=f"{len(ended)} runs ended", title_justify="left")
    for column in ("run", "state", "update", "loss", "time left"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for status in [*ended[-8:], *(s for s in statuses if s.state == "running")]:
        going = status.state == "running"
        left = show.duration(status.seconds_left) if going and status.seconds_left is not None else ""
        progress = f"{status.step}/{status.steps}" if going else ""
        loss = f"{status.loss:.4f}" if status.loss is not None else ""
        table.add_row(status.run.folder, status.note or status.state if going else status.state, progress, loss, left)
    return table
