"""Data files as rows: JSON lines, CSV and Parquet, with every complaint naming file and line.

Three kinds, told by their columns: ``answers`` (prompt, answer), ``labels`` (text, label) and ``text`` (text).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graft.core.errors import GraftError, nearest

Kind = Literal["answers", "labels", "text"]
COLUMNS: dict[Kind, tuple[str, ...]] = {"answers": ("prompt", "answer"), "labels": ("text", "label"), "text": ("text",)}
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One example: the columns of its kind as text, and where it stands (``file:line``)."""

    values: dict[str, str]
    where: str

    def __getitem__(self, column: str) -> str:
        return self.values[column]


@dataclass(frozen=True)
class Table:
    """The rows of one file, all of one kind."""

    rows: list[Row]
    kind: Kind
    path: Path

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[str]:
        """The distinct labels (or answers), sorted."""
        column = {"labels": "label", "answers": "answer"}.get(self.kind)
        return sorted({row[column] for row in self.rows}) if column else []


def read(path: str | Path, split: str = "train", kind: Kind | None = None) -> Table:
    """The rows of a data file; a folder stands for its file ``<split>.jsonl`` (or .csv, .parquet).

    Raises :class:`GraftError` for a missing or empty file, an unknown format, columns that are no kind, and a row without a field.
    """
    file = _file(Path(path), split)
    rows: list[Row] = []
    for where, values in _records(file):
        if kind is None:
            kind = _kind(values, where)
        rows.append(_row(values, COLUMNS[kind], where))
    if not rows or kind is None:
        raise GraftError(f"{file} holds no rows; give a file with at least one.")
    return Table(rows, kind, file)


def _file(path: Path, split: str) -> Path:
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in SUFFIXES if (path / f"{split}{suffix}").is_file()]
        if not found:
            raise GraftError(f"{path} has no {split} file; it holds {', '.join(sorted(p.name for p in path.iterdir())) or 'nothing'}.")
        return found[0]
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir() if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        hint = nearest(path.name, siblings) if siblings else "give a JSON lines, CSV or Parquet file."
        raise GraftError(f"there is no data file {path}; {hint}")
    if path.suffix not in SUFFIXES:
        raise GraftError(f"{path} ends in {path.suffix or 'nothing'!r}; data can be {', '.join(SUFFIXES)}.")
    return path


def _records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row as it is in the file, with its place."""
    if file.suffix == ".parquet":
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise GraftError(f"{file} is Parquet, which needs pyarrow; run: pip install 'graft[train]'") from None
        try:
            records = pyarrow.parquet.read_table(file).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise GraftError(f"{file} is not a Parquet file that can be read ({str(error).splitlines()[0]}).") from None
        yield from ((f"{file}, row {number}", record) for number, record in enumerate(records, 1))
        return
    try:
        with open(file, encoding="utf-8-sig", newline="") as handle:
            if file.suffix == ".csv":
                reader = csv.DictReader(handle, strict=True)
                for record in reader:
                    where = f"{file}:{reader.line_num}"
                    if None in record:
                        raise GraftError(f"{where} has more fields than the header; quote the text that holds commas.")
                    yield where, dict(record)
                return
            for number, line in enumerate(handle, 1):
                if line.strip():
                    try:
                        record = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise GraftError(f"{file}:{number} is not valid JSON ({error.msg}); every line must be one object.") from None
                    if not isinstance(record, dict):
                        raise GraftError(f"{file}:{number} holds {type(record).__name__}, but every line must be one object.")
                    yield f"{file}:{number}", record
    except UnicodeDecodeError as error:
        raise GraftError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it.") from None
    except csv.Error as error:
        raise GraftError(f"{file} is not valid CSV ({error}).") from None


def _kind(values: dict[str, Any], where: str) -> Kind:
    for kind, columns in COLUMNS.items():
        if set(columns) <= set(values):
            return kind
    raise GraftError(f"{where} has the fields {', '.join(map(str, values)) or 'none'}; needed are prompt and answer, or text and label, or text.")


def _row(values: dict[str, Any], columns: tuple[str, ...], where: str) -> Row:
    kept = {}
    for column in columns:
        value = values.get(column)
        if isinstance(value, (int, float)) and column in ("label", "answer"):
            value = str(value)
        if value is None or not isinstance(value, str):
            seen = "no" if column not in values or value is None else f"a {type(value).__name__} as"
            raise GraftError(f"{where} has {seen} field {column!r}; every row needs {' and '.join(columns)} as text.")
        if not value.strip():
            raise GraftError(f"{where} has an empty field {column!r}; fill it or drop the row.")
        kept[column] = value
    return Row(kept, where)
