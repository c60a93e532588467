"""A comparison of real models on real reviews: it takes as long as it said, and the trained beat the untrained."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from graft.compare.answer import Answer
from graft.compare.comparison import compare, estimates, prepare_comparison
from graft.compare.config import CompareConfig
from graft.compare.estimate import Estimate, total_seconds
from graft.models import package_path
from graft.recipes.quickstart import REVIEWS

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    with open(package_path(*REVIEWS), encoding="utf-8", newline="") as file:
        rows = [{"text": row["text"], "label": row["label"]} for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    distinct = list({row["text"]: row for row in rows}.values())[::20][:400]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in distinct))
    return folder / "rows.jsonl"


def test_minilm_takes_as_long_as_estimated_and_learns(reviews: Path, tmp_path: Path) -> None:
    values = {"data": str(reviews), "output": str(tmp_path / "out"), "model": "minilm", "steps": 60, "max_length": 64, "tune": "none", "lrs": [1e-3],
              "seeds": 1, "batch_size": 8}  # fmt: skip
    comparison = prepare_comparison(CompareConfig.make(values))
    expected = estimates(comparison)
    began = time.monotonic()
    records = compare(comparison)
    took = time.monotonic() - began
    assert 0.5 < total_seconds(comparison, expected, 1) / took < 2
    for record in records:
        known = expected[record["contender"]]
        assert isinstance(known, Estimate)
        assert 0.5 < known.memory / record["peak_memory_bytes"] < 2
        if record["step_seconds"]:
            assert 0.5 < known.update / record["step_seconds"] < 2
    by_name = {entry.name: entry.quality.mean for entry in Answer(records).entries}
    assert by_name["lora"] > by_name["base"] + 0.05
