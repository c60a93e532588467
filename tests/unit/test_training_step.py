"""The arithmetic of benchmarks/training_step.py, on numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "training_step.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("training_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_blocks_run_in_the_order_a_b_b_a(bench: ModuleType) -> None:
    ours, peft = "ours", "peft"
    assert bench.order(1) == [(ours, peft)]
    assert [side for pair in bench.order(4) for side in pair] == [ours, peft, peft, ours, ours, peft, peft, ours]


def test_speed_comes_from_the_median_step(bench: ModuleType) -> None:
    assert bench.tokens_per_second([0.5, 9.0, 0.4], 512) == 1024  # the disturbed step of 9 s does not count
    assert bench.tokens_per_second([0.25, 0.75], 100) == 200


def test_spread(bench: ModuleType) -> None:
    assert bench.spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0}


def test_ratios_are_taken_within_the_pairs(bench: ModuleType) -> None:
    found = bench.compare([100.0, 30.0, 80.0], [50.0, 20.0, 80.0])
    assert found["ratio"] == {"median": 1.5, "low": 1.0, "high": 2.0}  # 2, 1.5, 1; the ratio of the medians would be 1.6
    assert found["ours"]["median"] == 80
    assert found["peft"]["median"] == 50


def test_sides_with_unequal_numbers_of_blocks_are_no_pairs(bench: ModuleType) -> None:
    with pytest.raises(ValueError, match="zip"):
        bench.compare([1.0, 2.0], [1.0])


def test_summary_pairs_blocks_whatever_side_ran_first(bench: ModuleType) -> None:
    mib = 2**20
    blocks = [
        {"side": "ours", "seconds": [1.0, 1.0], "tokens": 400, "memory": 30 * mib},
        {"side": "peft", "seconds": [2.0, 2.0], "tokens": 400, "memory": 40 * mib},
        {"side": "peft", "seconds": [8.0, 8.0], "tokens": 400, "memory": 40 * mib},
        {"side": "ours", "seconds": [2.0, 2.0], "tokens": 400, "memory": 10 * mib},
    ]
    found = bench.summary(blocks)
    assert found["tokens_per_second"]["ours"] == {"median": 300, "low": 200, "high": 400}
    assert found["tokens_per_second"]["peft"] == {"median": 125, "low": 50, "high": 200}
    assert found["tokens_per_second"]["ratio"] == {"median": 3, "low": 2, "high": 4}
    assert found["memory_mib"]["ratio"] == {"median": 0.5, "low": 0.25, "high": 0.75}


def test_losses_agree_as_well_as_their_worst_step(bench: ModuleType) -> None:
    assert bench.largest_difference([2.0, 1.5, 1.0], [2.0, 1.25, 1.125]) == 0.25
    assert bench.largest_difference([2.0, math.nan], [2.0, 1.0]) == math.inf
