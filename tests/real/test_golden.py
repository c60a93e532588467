"""The evaluator, pinned: what it says about two real models on a few rows must not drift with its code or the libraries under it.

``tests/golden/evaluator.json`` was written by ``python -m tests.real.test_golden`` (then read by a person). The rules behind the figures are
tested against plain loops in tests/unit/test_evaluate.py; here only their staying the same. Where this fails, results of before and after
cannot stand in one table: find the reason, and only then write the file again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graft
from graft.compare.forgetting import forgetting, general_text
from graft.data.reading import Row, Table, read
from graft.training.evaluate import evaluate

pytestmark = pytest.mark.real
FOLDER = Path(__file__).parents[1] / "golden"
SUMS = ["What is 2 + 3?", "I have 7 apples and eat 2. How many are left?", "What is 10 times 4?", "A box holds 6 eggs. How many do 3 boxes hold?"]
ANSWERS = ["5", "5", "40", "18"]


def figures() -> dict[str, Any]:
    """What the evaluator says now."""
    model, tokenizer = graft.load("smollm2")
    rows = read(FOLDER / "rows.jsonl")
    sums = Table([Row({"prompt": p, "answer": a}, "here") for p, a in zip(SUMS, ANSWERS, strict=True)], "answers", FOLDER)
    found = {
        "choice": evaluate(model, tokenizer, rows),
        "written": evaluate(model, tokenizer, sums, match="number", new_tokens=24),
        "text": evaluate(model, tokenizer, general_text(None), max_length=128),
    }
    labelled = Table([Row({"text": row["prompt"], "label": row["answer"]}, row.where) for row in rows.rows], "labels", FOLDER)
    encoder, words = graft.load("minilm", task="classification", labels=["animal", "colour"], seed=0)
    found["head"] = evaluate(encoder, words, labelled)
    adapter = graft.attach(model, "lora", rank=2)
    return {
        **{
            name: {"rule": each.rule, "metrics": each.metrics, "predictions": each.predictions, "losses": [round(loss, 4) for loss in each.losses]}
            for name, each in found.items()
        },
        "forgetting of a fresh adapter": forgetting(model, tokenizer, adapter, None)["value"],
    }


def test_the_evaluator_says_what_it_always_said() -> None:
    golden, now = json.loads((FOLDER / "evaluator.json").read_text()), figures()
    assert set(golden) == set(now)
    for name in ("choice", "written", "text", "head"):
        assert now[name]["rule"] == golden[name]["rule"]
        assert now[name]["predictions"] == golden[name]["predictions"]
        assert now[name]["losses"] == pytest.approx(golden[name]["losses"], abs=2e-3)
        assert now[name]["metrics"] == pytest.approx(golden[name]["metrics"], abs=2e-3, rel=2e-3)
    assert now["forgetting of a fresh adapter"] == pytest.approx(0, abs=1e-6)


if __name__ == "__main__":
    (FOLDER / "evaluator.json").write_text(json.dumps(figures(), indent=1) + "\n")
