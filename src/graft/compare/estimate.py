"""Time and memory of a comparison beforehand: a few real updates of each contender, on rows from the shortest to the longest.

Rows at even distances in the order of their length stand for all of them, the longest included, so the time of an update is typical and the
memory is the highest.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.compare import job
from graft.compare.contenders import Contender
from graft.compare.json_lines import read_lines, to_lines
from graft.compare.plan import Run, Wanted
from graft.compare.workers import LOG, fresh_processes, stand_alone
from graft.core.errors import GraftError
from graft.data.reading import Table, read
from graft.training.fit import METRICS
from graft.training.memory import peak

if TYPE_CHECKING:
    from graft.compare.comparison import Comparison

UPDATES = 4
ROWS = 32  # of the validation rows that are scored


@dataclass(frozen=True)
class Estimate:
    """Seconds of everything around the updates of one run, of an update, of a scored row; bytes at the highest; how many runs there are."""

    setup: float
    update: float
    row: float
    memory: int
    runs: int
    tests: int

    def seconds(self, steps: int, validation_rows: int, test_rows: int) -> float:
        """All runs of the contender, one after another."""
        return self.runs * (self.setup + steps * self.update + validation_rows * self.row) + self.tests * test_rows * self.row


def estimate(comparison: Comparison, contender: Contender, threads: int) -> Estimate | str:
    """The estimate of one contender with so many threads a run; what went wrong, in a sentence, where it fails."""
    config = comparison.config
    searched = len(config.lrs) + (2 if config.refine and len(config.lrs) > 1 else 0) if config.tune == "lr" else 0
    tests = config.seeds if contender.draws else 1
    runs = max(searched + tests - 1, tests) if contender.trains else tests
    with tempfile.TemporaryDirectory() as folder:
        receive, send = fresh_processes().Pipe(duplex=False)
        process = fresh_processes().Process(target=_probe, args=(send, folder, comparison, contender, threads))
        process.start()
        send.close()
        try:
            found = receive.recv()
        except EOFError:
            process.join()
            return f"its process ended with code {process.exitcode}."
        process.join()
    return found if isinstance(found, str) else Estimate(**found, runs=runs, tests=tests)


def _probe(send: Any, folder: str, comparison: Comparison, contender: Contender, threads: int) -> None:
    """What the process of an estimate does."""
    stand_alone(Path(folder) / LOG)
    try:
        config = comparison.config.model_copy(update={"steps": UPDATES, "prune": False})
        path, splits = Path(folder) / "run", Path(folder) / "data"
        shutil.copytree(comparison.splits.folder, splits)
        train, validation = (read(splits / f"{name}.jsonl", kind=comparison.splits.kind) for name in ("train", "validation"))
        few = {"train": _spread(train, UPDATES * config.batch_size * config.accumulation), "validation": _spread(validation, ROWS)}
        for name, table in few.items():
            (splits / f"{name}.jsonl").write_bytes(to_lines(row.values for row in table.rows))
        run = Run(contender.name, config.lrs[len(config.lrs) // 2] if contender.trains else None, 0)
        used = replace(comparison.splits, folder=str(splits))
        job.write(path, Wanted(run, test=False), contender, config, used, threads, jobs=1)
        began = time.perf_counter()
        job.run_job(path)
        whole = time.perf_counter() - began
        result = json.loads((path / job.RESULT).read_text())
        if result["state"] == "failed":
            send.send(str(result["error"]))
            return
        updates = [line["seconds"] for line in read_lines(path / METRICS)]
        row = result["seconds_scoring"] / len(few["validation"])
        send.send(
            {"setup": max(0.0, whole - sum(updates) - result["seconds_scoring"]), "update": statistics.median(updates[1:]) if updates else 0.0,
             "row": row, "memory": peak()}
        )  # fmt: skip
    except GraftError as error:
        send.send(str(error))


def _spread(table: Table, count: int) -> Table:
    """``count`` rows at even distances in the order of their length, the shortest and the longest among them."""
    order = sorted(range(len(table)), key=lambda index: sum(map(len, table.rows[index].values.values())))
    count = min(count, len(table))
    places = [round(i * (len(order) - 1) / max(count - 1, 1)) for i in range(count)]
    return Table([table.rows[order[place]] for place in places], table.kind, table.path)


def total_seconds(comparison: Comparison, found: Mapping[str, Estimate | str], slots: int, steps: int | None = None) -> float:
    """All runs of all contenders."""
    config, rows = comparison.config, comparison.splits.rows
    each = [e.seconds(config.steps if steps is None else steps, rows["validation"], rows["test"]) for e in found.values() if isinstance(e, Estimate)]
    return sum(each) / slots


def steps_for(comparison: Comparison, found: Mapping[str, Estimate | str], slots: int) -> int:
    """The most updates with which everything takes no longer than ``minutes``; raises :class:`GraftError` where even two are too many."""
    minutes = comparison.config.minutes
    assert minutes is not None
    fixed, one = total_seconds(comparison, found, slots, 0), total_seconds(comparison, found, slots, 1)
    steps = math.floor((60 * minutes - fixed) / max(one - fixed, 1e-9))
    if steps < 2:
        raise GraftError(
            f"{minutes:g} minutes are not enough: everything but the updates takes about {fixed / 60:.0f}; give more, fewer methods or --seeds 1."
        )
    return steps
