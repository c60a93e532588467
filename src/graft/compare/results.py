"""``results.jsonl``: a line a run. The schema is in docs/compare.md; :data:`FIELDS` is its one list of keys."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.compare.contenders import Contender
from graft.compare.job import JOB, PREDICTIONS, RESULT, RUNGS
from graft.compare.json_lines import read_lines, to_lines
from graft.compare.plan import Run
from graft.compare.splits import FOLDER
from graft.core.catalogue import catalogue
from graft.core.errors import GraftError
from graft.core.storage import write_folder
from graft.data.reading import Table, read
from graft.training.fit import METRICS

RESULTS, RUNS = "results.jsonl", "runs"
FORMAT = 1
FIELDS = {
    "format": "version of this schema",
    "contender": "its name in the table",
    "method": "method of the catalogue; empty where nothing is trained",
    "settings": "hyper-parameters that differ from the method's defaults",
    "baseline": "whether it is one of the baselines",
    "lr": "learning rate; null where nothing is trained",
    "seed": "of the adapter, the data order, dropout and a new head",
    "chosen": "whether this learning rate was chosen, so that the run counts",
    "state": "finished, failed, pruned, or left out of the budget",
    "error": "why there is no result, in a sentence",
    "validation": "figures on the validation rows: loss (nats) and, where it is cheap, accuracy",
    "test": "figures on the test rows: accuracy and loss; null where the run does not count",
    "rule": "how an answer was found and judged",
    "predictions": "file with a line a test row, relative to this one",
    "predictions_hash": "sha256 of that file",
    "forgetting": "what was lost on general text: measure (loss in nats a token, or drift as a cosine distance) and value",
    "trainable_parameters": "numbers that were trained",
    "base_parameters": "numbers in the base model, with its head",
    "adapter_bytes": "size of the saved adapter",
    "peak_memory_bytes": "highest resident memory of the training process",
    "step_seconds": "median seconds of an update",
    "seconds": "seconds of the training in all, set-up included",
    "seconds_scoring": "seconds of scoring validation rows and, where it counts, test rows and general text",
    "loss": "training loss at the last update",
    "rows_shortened": "train rows that were cut to max_length",
    "ranks": "rank by target, where the method moved ranks; else null",
    "mergeable": "whether the adapted weight can be written into a plain model",
    "data": "sha256 and number of rows by split, and the kind of data",
    "base": "name of the base model and fingerprint of its body, without head; none where training gave the base up",
    "code": "sha256 over Graft's source files",
    "versions": "python and packages",
    "machine": "platform, processor and threads of the run",
    "jobs": "runs at a time, which share the machine",
    "folder": "of the run, relative to this file",
}


def read_results(folder: Path) -> dict[Run, dict[str, Any]]:
    """``result.json`` of every run that has ended."""
    found = {}
    for path in sorted((folder / RUNS).glob(f"*/[!.]*/{RESULT}")):
        job = json.loads((path.parent / JOB).read_text())
        found[Run(job["contender"], job["lr"], job["seed"])] = json.loads(path.read_text())
    return found


def lines(
    folder: Path,
    contenders: Iterable[Contender],
    results: Mapping[Run, Mapping[str, Any]],
    chosen: Mapping[str, float | None],
    common: Mapping[str, Any],
    left_out: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The lines of ``results.jsonl`` in the table's order; ``common`` holds what all runs share, ``left_out`` who cannot run and why."""
    found = []
    for contender in contenders:
        for run, result in results.items():
            if run.contender != contender.name:
                continue
            path = folder / RUNS / run.folder
            predictions = path / PREDICTIONS
            counts = result.get("test") is not None and run.lr == chosen.get(contender.name)
            own = {
                "format": FORMAT, "contender": contender.name, "method": contender.method, "settings": dict(contender.settings),
                "baseline": contender.baseline, "lr": run.lr, "seed": run.seed, "chosen": counts,
                "mergeable": catalogue[contender.method].mergeable if contender.method else "exactly", "folder": str(path.relative_to(folder)),
                "predictions": str(predictions.relative_to(folder)) if counts else None,
                "predictions_hash": hashlib.sha256(predictions.read_bytes()).hexdigest() if counts else None,
            }  # fmt: skip
            found.append({key: own.get(key, result.get(key, common.get(key))) for key in FIELDS})
    for name, why in left_out.items():
        own = {"format": FORMAT, "contender": name, "chosen": False, "state": "left out", "error": f"it {why}", "baseline": False}
        found.append({key: own.get(key, common.get(key)) for key in FIELDS})
    return found


def write_lines(folder: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``results.jsonl``, atomically."""
    write_folder(folder, {RESULTS: to_lines(lines)})


def write_together(folder: Path, records: Sequence[Record]) -> None:
    """``results.jsonl`` of records from several folders, their files named from here."""

    def from_here(record: Record, key: str) -> str | None:
        return None if record[key] is None else os.path.relpath(record.root / record[key], folder)

    write_lines(folder, [{**record.line, **{key: from_here(record, key) for key in ("folder", "predictions")}} for record in records])


@dataclass(frozen=True)
class Record:
    """One line of ``results.jsonl`` and where its folder is."""

    line: dict[str, Any]
    root: Path

    def __getitem__(self, key: str) -> Any:
        return self.line[key]

    def curve(self) -> list[tuple[int, float]]:
        """Training loss by update; empty where the run's folder is gone."""
        return [(line["step"], line["loss"]) for line in read_lines(self.root / self["folder"] / METRICS, growing=True)]

    def rungs(self) -> list[tuple[int, dict[str, Any]]]:
        """Figures on the validation rows by update, where the comparison looked on the way."""
        return [(line["step"], line["metrics"]) for line in read_lines(self.root / self["folder"] / RUNGS, growing=True)]

    def predictions(self) -> list[dict[str, Any]]:
        """What was said to each test row."""
        path = self.root / str(self["predictions"])
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != self["predictions_hash"]:
            raise GraftError(f"{path} is not the file that {self.root / RESULTS} names (its hash differs); copy the comparison's folder again.")
        return read_lines(path)


def load_records(folder: str | Path) -> list[Record]:
    """The records of a comparison's folder; raises :class:`GraftError` where there are none or they are of another version."""
    folder = Path(folder)
    path = folder / RESULTS
    if not path.is_file():
        raise GraftError(f"{folder} has no {RESULTS}; give the --output folder of an earlier graft compare.")
    try:
        found = [Record(line, folder) for line in read_lines(path)]
    except json.JSONDecodeError as error:
        raise GraftError(f"{path} is not valid JSON lines ({error.msg}); copy it again.") from None
    for record in found:
        if record.line.get("format") != FORMAT or set(FIELDS) - set(record.line):
            raise GraftError(f"{path} was written by another version of Graft; run the comparison again.")
    return found


def together(folders: Sequence[str | Path]) -> tuple[list[Record], Table]:
    """Records of several comparisons on the same rows and base model, and the test rows.

    A contender with other settings, or a seed that two folders have, keeps its folder's name behind its own. Raises :class:`GraftError`
    where the results cannot be compared.
    """
    records: list[Record] = []
    taken: dict[tuple[str, float | None, int], Record] = {}
    first: Record | None = None
    for folder in folders:
        for record in load_records(folder):
            first = first or record
            for what, seen, wanted in (
                ("test rows", record["data"]["hashes"]["test"], first["data"]["hashes"]["test"]),
                ("train rows", record["data"]["hashes"]["train"], first["data"]["hashes"]["train"]),
                ("base model", (record["base"] or {}).get("name"), (first["base"] or {}).get("name")),
            ):
                if seen != wanted:
                    raise GraftError(f"{folder} was made with other {what} than {folders[0]}, so their results cannot stand in one table.")
            key = (record["contender"], record["lr"], record["seed"])
            if key in taken and taken[key].line != record.line:
                record = Record({**record.line, "contender": f"{record['contender']} ({Path(folder).name})"}, record.root)
            elif key in taken:
                continue
            taken[key] = record
            records.append(record)
    if not records:
        raise GraftError("there is no result in these folders; give those of a graft compare that has begun.")
    return records, read(Path(folders[0]) / FOLDER / "test.jsonl")
