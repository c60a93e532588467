"""Data files: three formats, three kinds, and complaints that name file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graft import GraftError
from graft.data.reading import read

ROWS = [{"prompt": "one, two", "answer": "a\nb"}, {"prompt": 'say "hi"', "answer": "c"}]


def _jsonl(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    import csv

    jsonl = _jsonl(tmp_path / "d.jsonl", [json.dumps(r) for r in ROWS])
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer", "note"])
        writer.writeheader()
        writer.writerows([{**r, "note": "x"} for r in ROWS])
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for path in (jsonl, tmp_path / "d.csv", tmp_path / "d.parquet"):
        table = read(path)
        assert (table.kind, [row.values for row in table.rows]) == ("answers", ROWS)


@pytest.mark.parametrize(
    ("row", "kind"),
    [({"prompt": "p", "answer": "a", "text": "t"}, "answers"), ({"text": "t", "label": 1}, "labels"), ({"text": "t", "source": "s"}, "text")],
)
def test_the_columns_tell_the_kind(tmp_path: Path, row: dict[str, object], kind: str) -> None:
    assert read(_jsonl(tmp_path / "d.jsonl", [json.dumps(row)])).kind == kind


def test_number_labels_are_read_as_text(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "t", "label": n}) for n in (1, 0, 1)]
    assert read(_jsonl(tmp_path / "d.jsonl", lines)).labels == ["0", "1"]


def test_a_folder_stands_for_its_split(tmp_path: Path) -> None:
    _jsonl(tmp_path / "train.jsonl", [json.dumps({"text": "train"})])
    _jsonl(tmp_path / "test.jsonl", [json.dumps({"text": "test"})])
    assert read(tmp_path, "test").rows[0]["text"] == "test"
    with pytest.raises(GraftError, match=r"has no validation file; it holds test\.jsonl, train\.jsonl"):
        read(tmp_path, "validation")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ('{"text": "a"}\n{"text": 3}\n', r"d\.jsonl:2 has a int as field 'text'"),
        ('{"prompt": "a", "answer": "b"}\n\n{"prompt": "a"}\n', r"d\.jsonl:3 has no field 'answer'"),
        ('{"prompt": "a", "answer": null}\n', r"d\.jsonl:1 has no field 'answer'"),
        ('{"prompt": "a", "answer": " "}\n', r"d\.jsonl:1 has an empty field 'answer'"),
        ('{"text": "a"}\n{"text": \n', r"d\.jsonl:2 is not valid JSON"),
        ("[1, 2]\n", r"d\.jsonl:1 holds list"),
        ('{"question": "a"}\n', r"d\.jsonl:1 has the fields question; needed are prompt and answer"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(GraftError, match=message):
        read(path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    _jsonl(tmp_path / "reviews.jsonl", ['{"text": "a"}'])
    with pytest.raises(GraftError, match=r"there is no data file .*did you mean 'reviews\.jsonl'"):
        read(tmp_path / "reviws.jsonl")
    (tmp_path / "d.txt").write_text("a")
    with pytest.raises(GraftError, match=r"ends in '\.txt'; data can be \.jsonl"):
        read(tmp_path / "d.txt")
    (tmp_path / "d.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(GraftError, match="not a Parquet file"):
        read(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(GraftError, match="not UTF-8 text"):
        read(tmp_path / "d.jsonl")
    (tmp_path / "d.csv").write_text("text,label\na,b,c\n")
    with pytest.raises(GraftError, match=r"d\.csv:2 has more fields than the header"):
        read(tmp_path / "d.csv")
    (tmp_path / "short.csv").write_text("text,label\na,b\nc\n")
    with pytest.raises(GraftError, match=r"short\.csv:3 has no field 'label'"):
        read(tmp_path / "short.csv")
