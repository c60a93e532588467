"""The rates of a machine are measured once and kept; whatever else lies in their file is not believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from graft.kernels import plan
from graft.training import rates


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    yield
    plan.use_rates(None, torch.float32)


def measured(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes that are measured from now on, one entry a measurement."""
    asked: list[torch.dtype] = []
    real = rates.measure
    monkeypatch.setattr(rates, "measure", lambda dtype, device: asked.append(dtype) or real(dtype, device))
    return asked


def test_they_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch)
    first = rates.use_measured(torch.float32)
    assert first == rates.use_measured(torch.float32)
    assert asked == [torch.float32]
    (kept,) = json.loads((tmp_path / "cache" / rates.FILE).read_text()).values()
    assert first is not None
    assert tuple(kept) == first.values
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [rates.FILE]


def test_the_planner_uses_what_is_kept(tmp_path: Path) -> None:
    """As in tests/unit/test_plan.py: where products with a short side crawl, few short ones win."""
    rates.use_measured(torch.float32)
    (key,) = json.loads((tmp_path / "cache" / rates.FILE).read_text())
    (tmp_path / "cache" / rates.FILE).write_text(json.dumps({key: [1.0, 1000.0, 1000.0, 1000.0]}))
    shape = plan.Shape(1000, 100, 100, 8)
    plan.use_rates(None, torch.float32)
    assert plan.choose(shape, torch.float32) == plan.Plan(True, True, False)
    assert rates.use_measured(torch.float32) == plan.Rates((1.0, 1000.0, 1000.0, 1000.0))
    assert plan.choose(shape, torch.float32) == plan.Plan(True, True, True)


@pytest.mark.parametrize(
    "text", ["", "[]", "no json", '{"KEY": [1, 2]}', '{"KEY": [1, 2, 3, -4]}', '{"KEY": [1, 2, 3, "4"]}', '{"KEY": [1, 2, 3, Infinity]}']
)
def test_a_file_that_makes_no_sense_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    rates.use_measured(torch.float32)
    file = tmp_path / "cache" / rates.FILE
    (key,) = json.loads(file.read_text())
    file.write_text(text.replace("KEY", key))
    asked = measured(monkeypatch)
    assert rates.use_measured(torch.float32) is not None
    assert asked == [torch.float32]
    assert len(json.loads(file.read_text())[key]) == len(plan.SIDES)


def test_a_dtype_without_a_choice_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch)
    assert rates.use_measured(torch.bfloat16) is None
    assert asked == []
    assert not (tmp_path / "cache").exists()


def test_a_run_goes_on_with_the_rates_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch)
    before = [1.0, 1000.0, 1000.0, 1000.0]
    assert rates.use_measured(torch.float32, before=before) == plan.Rates((1.0, 1000.0, 1000.0, 1000.0))
    assert asked == []
    assert rates.use_measured(torch.float32, before=before[:2]) is not None  # no rates: this machine's
    assert asked == [torch.float32]


def test_what_another_process_found_meanwhile_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates.use_measured(torch.float32)
    file = tmp_path / "cache" / rates.FILE
    (key,) = json.loads(file.read_text())
    file.unlink()

    def slow(dtype: torch.dtype, device: str) -> plan.Rates:
        file.write_text(json.dumps({key: [4.0, 3.0, 2.0, 1.0], "another key": [1.0, 1.0, 1.0, 1.0]}))
        return plan.Rates((1.0, 2.0, 3.0, 4.0))

    monkeypatch.setattr(rates, "measure", slow)
    assert rates.use_measured(torch.float32) == plan.Rates((4.0, 3.0, 2.0, 1.0))
    assert json.loads(file.read_text()) == {key: [4.0, 3.0, 2.0, 1.0], "another key": [1.0, 1.0, 1.0, 1.0]}
