"""The arithmetic of benchmarks/cost_curves.py, on numbers worked out by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import cost_curves as bench
from tests.tiny import llama

MIB = 2**20


def block(side: str, seconds: float, mib: int) -> dict[str, Any]:
    plans = {"plans": {"6 to 12": "thin"}} if side == "planned" else {}
    return {"side": side, "seconds": [seconds, seconds, 9 * seconds], "tokens": 512, "memory": mib * MIB, **plans}


def test_each_curve_changes_one_thing() -> None:
    for curve, points in bench.CURVES.items():
        changed = {name for name in ("rank", "targets", "batch", "length") if len({getattr(point, name) for point in points}) > 1}
        assert changed == ({"batch", "length"} if curve == "length" else {curve})
    assert {point.batch * point.length for point in bench.CURVES["length"]} == {bench.TOKENS}


def test_the_planner_runs_where_it_may_choose() -> None:
    ours, peft, planned, thin = "ours", "peft", "planned", "thin"
    small, large = bench.Point("rank", 8), bench.Point("rank", 64, rank=64)
    assert bench.kinds(small, "float32", 2) == [ours, peft, peft, ours]
    assert bench.kinds(large, "float32", 2) == [ours, peft, planned, thin, peft, ours, planned, thin]
    assert bench.kinds(large, "bfloat16", 1) == [ours, peft]


def test_planned_is_compared_with_thin() -> None:
    blocks = [block("ours", 1, 100), block("peft", 2, 200), block("planned", 3, 300), block("thin", 4, 100)]
    found = bench.summary(blocks)
    assert found["seconds"]["ratio"]["median"] == 0.5
    assert found["memory_mib"]["ratio"]["median"] == 0.5
    assert found["planner"]["seconds"]["ratio"]["median"] == 0.75
    assert found["planner"]["memory_mib"]["ratio"]["median"] == 3
    assert found["planner"]["plans"] == {"6 to 12": "thin"}
    assert "planner" not in bench.summary(blocks[:2])


def test_targets_of_the_last_half() -> None:
    model = llama(layers=4)
    assert len(bench.names(model, "all linear")) == 4 * 7
    assert len(bench.names(model, "attention")) == 4 * 4
    assert len(bench.names(model, "q, v")) == 4 * 2
    half = bench.names(model, "last half")
    assert len(half) == 2 * 7
    assert {name.split(".")[2] for name in half} == {"2", "3"}


def test_a_run_reports_its_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    numbers = {"ours": (1.0, 100), "peft": (2.0, 200), "planned": (0.9, 150), "thin": (1.0, 100)}
    monkeypatch.setattr(bench, "in_process", lambda script, task, side, **arguments: block(side, *numbers[side]))
    options = argparse.Namespace(
        curves=list(bench.CURVES), values=["8", "64", "q, v"], dtypes=["float32"], pairs=1, steps=2, no_verify=True, output=tmp_path
    )
    report = bench.run(options)
    assert [(result["curve"], result["value"]) for result in report["results"]] == [("rank", 8), ("rank", 64), ("length", 64), ("targets", "q, v")]
    page = bench.markdown(report)
    assert "| 64 | float32 | 4 x 128 | 1.00 | 2.00 | 0.50 (0.50 to 0.50) | 100 | 200 | 0.50 (0.50 to 0.50) | 0.90 (0.90 to 0.90) | 1.50" in page
    assert "| q, v | float32 | 4 x 128 |" in page
