"""The command: what a user sees while a comparison runs, and at its end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from graft.cli.app import app
from graft.cli.compare import _status_table
from graft.compare.comparison import Status
from graft.compare.plan import Run
from tests import folders


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("command")
    folders.causal(root / "model")
    folders.answers(root / "rows.jsonl", 40)
    return root


def run(place: Path, output: Path, *arguments: str) -> Result:
    small = ["--steps", "2", "--seeds", "1", "--batch-size", "4", "--max-length", "40", "--tune", "none", "--lrs", "1e-3"]
    given = [str(place / "rows.jsonl"), "--model", str(place / "model"), "--output", str(output)]
    return CliRunner().invoke(app, ["compare", *given, *small, *arguments])


def test_the_answer_comes_first_then_the_table_then_where_the_rest_is(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", "--methods", "dora")
    assert result.exit_code == 0, result.output
    said = result.stdout
    assert said.startswith("On this data ")
    assert said.index("On this data") < said.index("few-shot") < said.index("report.html")
    assert "There is no test file; 8 test rows were split off the train rows." in result.stderr
    assert "finished" in result.stderr  # nobody looks, so a line for each run
    for name in ("report.html", "report.md", "report.png", "results.jsonl"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    again = run(place, tmp_path / "out", "--methods", "dora", "--json")  # nothing is left to do
    answer = json.loads(again.stdout)
    assert {entry["name"] for entry in answer["table"]} == {"base", "few-shot", "full", "lora", "dora"}
    assert answer["answer"].startswith("On this data ")


def test_a_dry_run_estimates_and_trains_nothing(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["methods"]) == {"base", "few-shot", "full", "lora"}
    assert found["seconds"] == pytest.approx(sum(each["seconds"] for each in found["methods"].values()))
    assert all(each["memory_bytes"] > 1e8 for each in found["methods"].values())
    assert not (tmp_path / "out" / "runs").exists()


def test_a_method_that_does_not_fit_the_budget_is_named(place: Path, tmp_path: Path) -> None:
    result = run(place, tmp_path / "out", "--methods", "hydra", "--budget", "params=5%", "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert "has no size with at most" in answer["failed"]["hydra"]
    sizes = {entry["name"]: entry["share"] for entry in answer["table"]}
    assert 0 < sizes["lora"] <= 0.05


def test_the_live_table_shows_what_is_going_on() -> None:
    statuses = [Status(Run("lora", 1e-3, seed), "finished") for seed in range(12)]
    statuses += [Status(Run("dora", 1e-3, 0), "failed", note="it broke"), Status(Run("dora", 1e-2, 0), "running", 30, 100, 0.5, 95.0)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(_status_table(statuses))
    said = console.export_text()
    assert "13 runs ended" in said
    assert said.count("finished") == 7  # the last of them
    assert "30/100" in said
    assert "0.5000" in said
    assert "1 min 35 s" in said


@pytest.mark.parametrize("extra", [("--jobs", "2"), ("--dry-run",), ("--ray", "auto"), ("--config", "x.yaml"), ("--seeds", "2")])
def test_loading_refuses_what_is_for_running(place: Path, extra: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["compare", "--load", str(place), *extra])
    assert result.exit_code == 2
    assert f"{extra[0]} has no meaning" in result.stderr


@pytest.mark.parametrize("extra", [("--dry-run",), ("--budget", "minutes=5")])
def test_a_cluster_is_not_estimated(place: Path, tmp_path: Path, extra: tuple[str, ...]) -> None:
    given = ["compare", str(place / "rows.jsonl"), "--model", str(place / "model"), "--output", str(tmp_path / "out"), "--ray", "auto"]
    result = CliRunner().invoke(app, [*given, *extra])
    assert result.exit_code == 2
    assert "time is estimated on this machine" in result.stderr
    assert not (tmp_path / "out").exists()


def test_no_runs_at_a_time(place: Path, tmp_path: Path) -> None:
    assert run(place, tmp_path / "out", "--jobs", "0").exit_code == 2
