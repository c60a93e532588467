"""Splits: disjoint, fixed, and never chosen by the test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graft import GraftError
from graft.compare.config import CompareConfig
from graft.compare.splits import Splits, prepare
from graft.data.reading import read
from tests import folders


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(numbers: range, word: str = "film") -> list[dict[str, Any]]:
    return [{"text": f"{word} {number}", "label": ("bad", "good")[number % 2]} for number in numbers]


def made(tmp_path: Path, data: Path, **values: Any) -> Splits:
    model = values.pop("model", None) or folders.causal(tmp_path / "model")
    return prepare(CompareConfig.make({"data": str(data), "output": str(tmp_path / "out"), "model": str(model), "max_length": 40, **values}))


def texts(splits: Splits) -> dict[str, list[str]]:
    column = {"labels": "text", "answers": "prompt", "text": "text"}[splits.kind]
    return {name: [row[column] for row in read(splits.path(name), kind=splits.kind).rows] for name in ("train", "validation", "test")}


def test_files_of_their_own_are_taken_as_they_are(tmp_path: Path) -> None:
    for name, numbers in {"train": range(20), "validation": range(20, 26), "test": range(30, 40)}.items():
        write(tmp_path / "data" / f"{name}.jsonl", labelled(numbers))
    splits = made(tmp_path, tmp_path / "data")
    assert splits.rows == {"train": 20, "validation": 6, "test": 10}
    assert splits.notes == []
    assert texts(splits)["test"] == [f"film {n}" for n in range(30, 40)]


@pytest.mark.parametrize("count", [10, 57])
def test_one_file_is_split_without_overlap(tmp_path: Path, count: int) -> None:
    splits = made(tmp_path, write(tmp_path / "rows.jsonl", labelled(range(count))))
    found = texts(splits)
    numbers = sorted(int(text.split()[1]) for texts in found.values() for text in texts)
    assert numbers == list(range(count))
    assert any("no test file" in note for note in splits.notes)


def test_too_few_rows(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="has 6 rows, too few to hold some out"):
        made(tmp_path, write(tmp_path / "rows.jsonl", labelled(range(6))))


def test_train_rows_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", labelled(range(30)))
    write(tmp_path / "data" / "test.jsonl", [*labelled(range(5)), *labelled(range(90, 95))])
    splits = made(tmp_path, tmp_path / "data")
    found = texts(splits)
    assert not set(found["train"]) & set(found["test"])
    assert not set(found["validation"]) & set(found["test"])
    assert "5 train rows that are also held out" in " ".join(splits.notes)


def test_rows_that_no_run_could_read_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    rows = [{"prompt": f"film {n}", "answer": "good " * (60 if n == 7 else 1 + n % 2)} for n in range(30)]
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(GraftError, match=r"rows.jsonl:8: the answer takes \d+ tokens .* more than max_length = 40"):
        made(tmp_path, data)
    with pytest.raises(GraftError, match=r"max_length is 100, but .*model reads at most 64 tokens; lower it"):
        made(tmp_path, data, max_length=100)
    assert not (tmp_path / "out").exists()


def test_everything_held_out(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        write(tmp_path / "data" / f"{name}.jsonl", labelled(range(12)))
    with pytest.raises(GraftError, match="nothing is left to train on"):
        made(tmp_path, tmp_path / "data")


def test_a_validation_file_that_is_the_test_file_is_not_used(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", labelled(range(40)))
    for name in ("validation", "test"):
        write(tmp_path / "data" / f"{name}.jsonl", labelled(range(50, 60)))
    splits = made(tmp_path, tmp_path / "data")
    assert "nobody may choose by" in splits.notes[0]
    assert set(texts(splits)["validation"]) < {f"film {n}" for n in range(40)}


def test_limits_and_repetition(tmp_path: Path) -> None:
    for name, numbers in {"train": range(20), "validation": range(20, 60), "test": range(60, 200)}.items():
        write(tmp_path / "data" / f"{name}.jsonl", labelled(numbers))
    one = made(tmp_path / "a", tmp_path / "data", validation_rows=7, test_rows=11)
    two = made(tmp_path / "b", tmp_path / "data", validation_rows=7, test_rows=11)
    assert one.rows == {"train": 20, "validation": 7, "test": 11}
    assert one.hashes == two.hashes


def test_a_test_file_from_elsewhere(tmp_path: Path) -> None:
    data, other = write(tmp_path / "rows.jsonl", labelled(range(20))), write(tmp_path / "other" / "test.jsonl", labelled(range(50, 53)))
    assert made(tmp_path, data, test=str(other.parent)).rows == {"train": 16, "validation": 4, "test": 3}
    assert made(tmp_path / "b", data, test=str(other)).rows["test"] == 3


def test_labels_that_nobody_trains(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", labelled(range(20)))
    write(tmp_path / "data" / "test.jsonl", [{"text": "x", "label": "odd"}, {"text": "y", "label": "good"}])
    with pytest.raises(GraftError, match="the test rows have the label 'odd', which no train row has"):
        made(tmp_path, tmp_path / "data")


def test_going_on_reads_the_same_files_and_refuses_others(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", labelled(range(20)))
    first = made(tmp_path, data)
    data.unlink()  # the copy counts
    assert made(tmp_path, data) == first
    first.path("test").write_text('{"text": "easy", "label": "good"}\n')
    with pytest.raises(GraftError, match="is not the file that this comparison began with"):
        made(tmp_path, data)


def test_answers_become_labels_for_an_encoder(tmp_path: Path) -> None:
    encoder = folders.encoder(tmp_path / "encoder")
    data = write(tmp_path / "rows.jsonl", [{"prompt": f"film {n}", "answer": ("bad", "good")[n % 2]} for n in range(20)])
    splits = made(tmp_path, data, model=str(encoder))
    assert (splits.kind, splits.choices) == ("labels", ["bad", "good"])
    assert any("encoder" in note for note in splits.notes)
    many = write(tmp_path / "many.jsonl", [{"prompt": f"film {n}", "answer": f"a{n}"} for n in range(40)])
    with pytest.raises(GraftError, match=r"is an encoder, which writes no text, and the rows have \d+ distinct answers"):
        made(tmp_path / "b", many, model=str(encoder))
