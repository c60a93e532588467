"""The arithmetic of benchmarks/operations.py, on numbers worked out by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

import operations as bench


def block(side: str, *seconds: float) -> dict[str, Any]:
    return {"side": side, "cycles": [dict.fromkeys(bench.OPERATIONS, value) for value in seconds]}


def test_medians_of_cycles_are_compared_in_pairs() -> None:
    found = bench.summary([block("ours", 1, 2, 9), block("peft", 4, 4, 4), block("peft", 1, 1, 1), block("ours", 3, 3, 3)])["save"]
    assert found["ours"] == {"median": 2.5, "low": 2, "high": 3}  # the disturbed cycle of 9 s does not count
    assert found["ratio"] == {"median": 1.75, "low": 0.5, "high": 3.0}
    assert not found["met"]
    assert bench.summary([block("ours", 1), block("peft", 1)])["load"]["met"]


def test_a_run_reports_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(script: str, task: str, side: str, **arguments: Any) -> dict[str, Any]:
        asked.append(side)
        return block(side, 0.001 if side == "ours" else 0.002)

    monkeypatch.setattr(bench, "in_process", answer)
    report = bench.run(argparse.Namespace(dtypes=["float32"], pairs=2, no_verify=False, output=Path()))
    assert asked == ["ours", "peft", "peft", "ours"]
    page = bench.markdown(report)
    for operation, (ours, peft) in bench.OPERATIONS.items():
        assert f"| {operation} | float32 | {ours} | {peft} | 1.0 | 2.0 | 0.50 (0.50 to 0.50) | met |" in page
