"""What commands share: progress bars with time left on stderr, tables and JSON on stdout."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from graft.core.errors import GraftError
from graft.core.progress import watched

out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, highlight=False)


@contextmanager
def progress(label: str) -> Iterator[Callable[..., None]]:
    """A bar, shown from the first call of what it gives with (done, of how many, optional note), so that a refusal stands alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    bar = Progress(*columns, console=err)
    task = bar.add_task(label, total=None, note="")

    def advance(done: int, total: int, note: str | dict[str, Any] = "") -> None:
        bar.start()
        text = f"loss {note['loss']:.4f}" if isinstance(note, dict) else note
        bar.update(task, completed=done, total=total, note=text)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


@contextmanager
def long_work() -> Iterator[None]:
    """Bars for what the library does before it gets to a command's own work, where that takes more than a second."""
    bars, began, bar = ExitStack(), 0.0, None

    def watch(what: str, done: int, total: int) -> None:
        nonlocal began, bar
        if done in (0, total):
            bars.close()
            began, bar = time.monotonic(), None
        elif bar is None and time.monotonic() - began > 1:
            bar = bars.enter_context(progress(what))
        if bar is not None:
            bar(done, total)

    with bars, watched(watch):
        yield


@contextmanager
def waiting(label: str) -> Iterator[Callable[[str], None]]:
    """A turning sign while something of unknown length goes on; what it gives names the part."""
    with err.status(label) as status:
        yield lambda part: status.update(f"{label}: {part}")


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def print_json(value: Any) -> None:
    """One JSON object on one line."""
    print(json.dumps(value))


def print_table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]], right: tuple[str, ...] = ()) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    out.print(table)


def settings(pairs: list[str]) -> dict[str, str]:
    """``name=value`` pairs of ``--set``."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise GraftError(f"--set takes name=value, such as --set rank=8, but got {pair!r}.")
        found[name.strip()] = value.strip()
    return found


def size(count: float) -> str:
    """Bytes for a reader."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
