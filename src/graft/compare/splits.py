"""Train, validation and test rows of a comparison: fixed once, written into its folder, and disjoint.

What is silently wrong in many comparisons is refused or mended here and said: test rows among the train rows, a validation file that is the
test file once more, labels that the train rows do not have.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft.compare.config import CompareConfig
from graft.compare.contenders import contenders
from graft.compare.json_lines import to_lines
from graft.core.errors import GraftError
from graft.core.storage import to_json, write_folder
from graft.data.encoding import encode
from graft.data.reading import COLUMNS, SUFFIXES, Kind, Row, Table, read
from graft.models import check_max_length, load_tokenizer, reads_only
from graft.training.evaluate import MAX_CHOICES

NAMES = ("train", "validation", "test")
FOLDER, FACTS = "data", "data.json"
SHARE, FEWEST = 5, 8  # without a file of its own, a split takes one row in so many, of no fewer


@dataclass(frozen=True)
class Splits:
    """What the rows are: ``rows`` and ``hashes`` by split, ``choices`` (all labels or answers, where they are few), and ``notes`` on what
    was done to them."""

    folder: str
    kind: Kind
    rows: dict[str, int]
    hashes: dict[str, str]
    choices: list[str]
    notes: list[str]

    def path(self, split: str) -> Path:
        return Path(self.folder) / f"{split}.jsonl"


def prepare(config: CompareConfig) -> Splits:
    """The splits of a comparison, written into its folder the first time and read from there later.

    Raises :class:`GraftError` for data that cannot be split, for labels that are in no train row, and where the files have changed since.
    """
    folder = config.folder / FOLDER
    if (folder / FACTS).is_file():
        splits = Splits(**{**json.loads((folder / FACTS).read_text()), "folder": str(folder)})
        for name in NAMES:
            if not splits.path(name).is_file() or _hash(splits.path(name).read_bytes()) != splits.hashes[name]:
                raise GraftError(f"{splits.path(name)} is not the file that this comparison began with; put it back, or choose another --output.")
        return splits
    tables, notes = _tables(config)
    kind = tables["train"].kind
    if kind == "answers" and reads_only(config.model):
        if len(tables["train"].labels) > MAX_CHOICES:
            raise GraftError(
                f"{config.model} is an encoder, which writes no text, and the rows have {len(tables['train'].labels)} distinct answers; "
                f"give rows with at most {MAX_CHOICES}, or choose a causal model such as smollm2."
            )
        tables = {name: _as_labels(table) for name, table in tables.items()}
        kind = "labels"
        notes.append("The model is an encoder, so prompts became texts and answers labels.")
    refuse_unused(config, kind)
    _check_lengths(config, tables)
    choices = tables["train"].labels
    for name in NAMES[1:]:
        unknown = sorted(set(tables[name].labels) - set(choices))
        if kind == "labels" and unknown:
            raise GraftError(f"the {name} rows have the label {unknown[0]!r}, which no train row has; add rows of it, or drop it.")
    files = {name: to_lines(row.values for row in table.rows) for name, table in tables.items()}
    splits = Splits(
        folder=str(folder),
        kind=kind,
        rows={name: len(table) for name, table in tables.items()},
        hashes={name: _hash(content) for name, content in files.items()},
        choices=choices if kind != "text" and config.match == "exact" and len(choices) <= MAX_CHOICES else [],
        notes=notes,
    )
    facts = {key: value for key, value in asdict(splits).items() if key != "folder"}
    write_folder(folder, {**{f"{name}.jsonl": content for name, content in files.items()}, FACTS: to_json(facts)})
    return splits


def refuse_unused(config: CompareConfig, kind: Kind) -> None:
    """Raises :class:`GraftError` for settings that have no meaning with this kind of rows."""
    for key, unused in (("match", config.match != "exact"), ("shots", "shots" in config.model_fields_set)):
        if unused and kind != "answers":
            needs = "answers that are written" if key == "match" else "few-shot prompting"
            raise GraftError(f"{key} = {getattr(config, key)!r} is for {needs}, and these rows are {kind}; leave it out.")
    contenders(config, kind)  # a baseline that was named may be another kind's


def _check_lengths(config: CompareConfig, tables: Mapping[str, Table]) -> None:
    """Raises :class:`GraftError` where rows or model do not go with ``max_length``, which every run would find out for itself."""
    check_max_length(config.model, config.max_length)
    if tables["train"].kind == "answers":
        tokenizer = load_tokenizer(config.model)
        for table in tables.values():
            encode(table, tokenizer, config.max_length)


def _tables(config: CompareConfig) -> tuple[dict[str, Table], list[str]]:
    """The three tables and what had to be done to get them; the first draws come from a fixed seed, so that all comparisons agree."""
    source, notes = Path(config.data), []
    train = read(source, split="train")
    test = read(config.test, split="test", kind=train.kind) if config.test else _own(source, "test", train.kind)
    validation = _own(source, "validation", train.kind)
    if validation is not None and test is not None and _texts(validation) == _texts(test):
        validation = None
        notes.append("The validation file holds the test rows, which nobody may choose by; validation rows were split off the train rows.")
    if test is None:
        train, test = _split_off(train, config.test_rows)
        notes.append(f"There is no test file; {len(test)} test rows were split off the train rows.")
    elif len(test) > config.test_rows:
        notes.append(f"{config.test_rows} of {len(test)} test rows are used.")
        test = _sample(test, config.test_rows)
    if validation is None:
        train = _without(train, [test], notes)
        train, validation = _split_off(train, config.validation_rows)
    elif len(validation) > config.validation_rows:
        validation = _sample(validation, config.validation_rows)
    train = _without(train, [validation, test], notes)
    return {"train": train, "validation": validation, "test": test}, notes


def _own(source: Path, split: str, kind: Kind) -> Table | None:
    """The file that a data folder has for a split; None where there is none."""
    if not any((source / f"{split}{suffix}").is_file() for suffix in SUFFIXES):
        return None
    return read(source, split=split, kind=kind)


def _texts(table: Table) -> list[str]:
    """What is asked in each row."""
    return [row[COLUMNS[table.kind][0]] for row in table.rows]


def _without(train: Table, others: Sequence[Table], notes: list[str]) -> Table:
    """The train rows that are in no other table."""
    known = {text.strip() for table in others for text in _texts(table)}
    rows = [row for row, text in zip(train.rows, _texts(train), strict=True) if text.strip() not in known]
    if len(rows) < len(train):
        notes.append(f"{len(train) - len(rows)} train rows that are also held out were left out of training.")
    if not rows:
        raise GraftError(f"every row of {train.path} is also held out, so nothing is left to train on; give other test rows.")
    return Table(rows, train.kind, train.path)


def _split_off(table: Table, most: int) -> tuple[Table, Table]:
    if len(table) < FEWEST:
        raise GraftError(f"{table.path} has {len(table)} rows, too few to hold some out; give at least {FEWEST + 2}, or files of their own.")
    count = min(most, max(2, len(table) // SHARE))
    order = random.Random(0).sample(range(len(table)), len(table))
    held, kept = sorted(order[:count]), sorted(order[count:])
    return _rows(table, kept), _rows(table, held)


def _sample(table: Table, count: int) -> Table:
    return _rows(table, sorted(random.Random(0).sample(range(len(table)), count)))


def _rows(table: Table, indices: Sequence[int]) -> Table:
    return Table([table.rows[index] for index in indices], table.kind, table.path)


def _as_labels(table: Table) -> Table:
    rows = [Row({"text": row["prompt"], "label": row["answer"]}, row.where) for row in table.rows]
    return Table(rows, "labels", table.path)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def facts(splits: Splits) -> dict[str, Any]:
    """What a result says about its data."""
    return {"hashes": splits.hashes, "rows": splits.rows, "kind": splits.kind}
