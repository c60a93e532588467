"""Whole comparisons on tiny models: what they write, and that they go on, end the same, and stop for nobody."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import graft
from graft import GraftError
from graft.cli.app import app
from graft.compare.answer import Answer
from graft.compare.comparison import Comparison, compare, estimates, prepare_comparison
from graft.compare.config import CompareConfig
from graft.compare.contenders import contenders, parse, within
from graft.compare.estimate import Estimate
from graft.compare.job import JOB, PREDICTIONS, RESULT
from graft.compare.results import FIELDS, RESULTS, RUNS, load_records, together
from graft.compare.workers import LocalWorkers
from graft.core.catalogue import catalogue
from graft.core.target import find_targets
from graft.training.evaluate import evaluate
from graft.training.fit import METRICS
from tests import folders, tiny

SMALL = {"steps": 4, "batch_size": 4, "max_length": 40, "lrs": [1e-3, 1e-2], "refine": False, "seeds": 2, "test_rows": 12, "validation_rows": 8}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    root = tmp_path_factory.mktemp("compare")
    folders.causal(root / "causal")
    folders.encoder(root / "encoder")
    for kind in ("answers", "labels"):
        (root / kind).mkdir()
        make = getattr(folders, kind)
        make(root / kind / "train.jsonl", 40)
        make(root / kind / "test.jsonl", 16, seed=7)
    return root


def prepared(place: Path, output: Path, kind: str = "answers", **values: Any) -> Comparison:
    model = place / ("encoder" if kind == "labels" else "causal")
    values = {**SMALL, "data": str(place / kind), "model": str(model), "output": str(output), **values}
    return prepare_comparison(CompareConfig.make({key: value for key, value in values.items() if value is not None}))


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Answer]:
    comparison = prepared(place, tmp_path_factory.mktemp("done") / "out", methods=["shira", "lora:rank=2", "adalora"])
    return comparison, Answer(compare(comparison, LocalWorkers(2)))


def test_every_run_has_its_line_and_folder(done: tuple[Comparison, Answer]) -> None:
    comparison, answer = done
    lines = [json.loads(line) for line in (comparison.folder / RESULTS).read_text().splitlines()]
    assert all(set(line) == set(FIELDS) for line in lines)
    assert [record.line for record in answer.records] == lines
    counts = {name: sum(line["contender"] == name for line in lines) for name in answer.names}
    assert counts == {"base": 1, "few-shot": 2, "full": 3, "lora": 3, "shira": 3, "lora:rank=2": 3, "adalora": 3}  # 2 rates, then a second seed
    for line in lines:
        run = comparison.folder / line["folder"]
        assert (run / RESULT).is_file()
        assert line["state"] == "finished"
        assert (run / "adapter_model.safetensors").is_file() == (line["chosen"] and bool(line["method"]))
    assert {line["lr"] for line in lines if line["contender"] == "lora"} == {1e-3, 1e-2}


def test_conditions_are_the_same_for_all(done: tuple[Comparison, Answer]) -> None:
    comparison, answer = done
    jobs = [json.loads(path.read_text()) for path in (comparison.folder / RUNS).glob(f"*/*/{JOB}")]
    trained = [job["fit"] for job in jobs if job["fit"]]
    own = ("method", "settings", "targets", "lr", "seed", "output")
    assert len({json.dumps({key: value for key, value in fit.items() if key not in own}) for fit in trained}) == 1
    for key in ("data", "base", "code"):
        assert len({json.dumps(record[key], sort_keys=True) for record in answer.records if record["method"]}) == 1


def test_the_test_rows_are_scored_as_graft_eval_scores_them(done: tuple[Comparison, Answer]) -> None:
    from graft.data.reading import read
    from graft.models import load_with_adapter

    comparison, answer = done
    record = next(record for record in answer.counting if record["contender"] == "shira" and record["seed"] == 1)
    adapter, tokenizer = load_with_adapter(comparison.folder / record["folder"])
    again = evaluate(adapter.model, tokenizer, read(comparison.splits.path("test")), max_length=40)
    assert record["test"]["accuracy"] == again.metrics["accuracy"]
    assert [row["said"] for row in record.predictions()] == again.predictions
    entry = next(entry for entry in answer.entries if entry.name == "shira")
    assert entry.quality.mean == pytest.approx(np.mean([r["test"]["accuracy"] for r in answer.counting if r["contender"] == "shira"]))


def test_only_the_chosen_rate_saw_the_test_rows(done: tuple[Comparison, Answer]) -> None:
    _, answer = done
    for record in answer.records:
        assert (record["test"] is not None) == record["chosen"]
    for name in ("full", "lora", "shira"):
        tries = {record["lr"]: record["validation"] for record in answer.records if record["contender"] == name and record["seed"] == 0}
        best = min(tries, key=lambda rate: (-tries[rate]["accuracy"], tries[rate]["loss"]))
        assert {record["lr"] for record in answer.counting if record["contender"] == name} == {best}


def test_forgetting_is_the_rise_of_the_loss_on_general_text(done: tuple[Comparison, Answer]) -> None:
    from graft.compare.forgetting import general_text
    from graft.models import load, load_with_adapter

    comparison, answer = done
    record = next(record for record in answer.counting if record["contender"] == "full")
    adapter, tokenizer = load_with_adapter(comparison.folder / record["folder"])
    base, _ = load(comparison.config.model)
    after, before = (evaluate(model, tokenizer, general_text(None), max_length=64).metrics["loss"] for model in (adapter.model, base))
    assert record["forgetting"] == {"measure": "loss", "value": pytest.approx(after - before, abs=1e-6)}
    assert next(record for record in answer.counting if record["contender"] == "base")["forgetting"]["value"] == 0


def test_answer_and_table(done: tuple[Comparison, Answer]) -> None:
    _, answer = done
    assert answer.text.startswith("On this data ")
    assert "12 test rows tell only large differences apart" in answer.text
    assert {entry.name for entry in answer.entries} == set(answer.names)
    means = [entry.quality.mean for entry in answer.entries]
    assert means == sorted(means, reverse=True)


def test_nothing_is_left_to_do_and_other_settings_are_refused(place: Path, done: tuple[Comparison, Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, _ = done
    before = (comparison.folder / RESULTS).read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in comparison.folder.rglob(PREDICTIONS)}
    again = prepared(place, comparison.folder, methods=["shira", "lora:rank=2", "adalora"])
    compare(again, LocalWorkers(1))
    assert {path: path.stat().st_mtime_ns for path in comparison.folder.rglob(PREDICTIONS)} == stamps
    assert [record.line for record in load_records(comparison.folder)] == [json.loads(line) for line in before.splitlines()]
    monkeypatch.chdir(comparison.folder.parent)
    assert prepared(place, Path("out"), methods=["shira", "lora:rank=2", "adalora"]).contenders == comparison.contenders
    with pytest.raises(GraftError, match="holds a comparison with steps = 4, not 5"):
        prepared(place, comparison.folder, methods=["shira", "lora:rank=2", "adalora"], steps=5)


def _figures(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions."""
    same = ("contender", "lr", "seed", "chosen", "state", "validation", "test", "predictions_hash", "forgetting", "loss")
    return [{key: record[key] for key in same} for record in load_records(folder)]


def test_a_comparison_that_was_killed_goes_on_and_ends_the_same(place: Path, tmp_path: Path) -> None:
    values = {**SMALL, "steps": 12, "seeds": 1, "lrs": [1e-2], "methods": ["dora"], "data": str(place / "labels"), "model": str(place / "encoder")}
    whole = tmp_path / "whole"
    compare(prepare_comparison(CompareConfig.make({**values, "output": str(whole)})), LocalWorkers(1))
    killed = tmp_path / "killed"
    (tmp_path / "config.yaml").write_text(json.dumps({**values, "output": str(killed)}))
    command = [sys.executable, "-m", "graft", "compare", "--config", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines, deadline = killed / RUNS / "lora" / "lr=1.00e-02,seed=0" / METRICS, time.monotonic() + 120
    while not (lines.is_file() and len(lines.read_text().splitlines()) >= 7):  # its checkpoint is at 6
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    compare(prepare_comparison(CompareConfig.make({**values, "output": str(killed)})), LocalWorkers(1))
    assert _figures(killed) == _figures(whole)


def test_runs_die_with_their_comparison(place: Path, tmp_path: Path) -> None:
    values = {**SMALL, "steps": 5000, "data": str(place / "answers"), "model": str(place / "causal"), "output": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    process = subprocess.Popen(
        [sys.executable, "-m", "graft", "compare", "--config", str(tmp_path / "config.yaml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (found := list((tmp_path / "out" / RUNS).glob(f"full/*/{METRICS}"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)
    before = found[0].stat().st_size
    time.sleep(1)
    assert found[0].stat().st_size == before


def test_a_failing_method_stops_nobody(place: Path, tmp_path: Path) -> None:
    # galore per_layer excludes clipping, which is found out only when the run begins
    comparison = prepared(place, tmp_path / "out", methods=["galore:per_layer=true"], seeds=1, lrs=[1e-3], steps=2)
    answer = Answer(compare(comparison, LocalWorkers(2)))
    assert "per_layer" in answer.failed["galore:per_layer=true"]
    assert "galore:per_layer=true has no result" in answer.text
    assert {"base", "few-shot", "full", "lora"} == set(answer.names)


def test_a_process_that_dies_is_reported(place: Path, tmp_path: Path) -> None:
    comparison = prepared(place, tmp_path / "out", seeds=1, lrs=[1e-3], steps=400)

    class Killer(LocalWorkers):
        """Kills the run of full fine-tuning as the system does when memory ends."""

        def ended(self, seconds: float) -> Any:
            for folder, process in self.running.items():
                if "full" in folder.parts and process.is_alive() and (folder / METRICS).is_file():
                    os.kill(process.pid, signal.SIGKILL)
            yield from super().ended(seconds)

    records = compare(comparison, Killer(1))
    failed = [record for record in records if record["state"] == "failed"]
    assert [record["contender"] for record in failed] == ["full"]
    assert "signal 9 (killed; was there enough memory?)" in failed[0]["error"]


def test_pruning_stops_clear_losers_and_no_baseline(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graft.compare.comparison.POLL", 0.02)  # or such short runs end before anybody looks at them
    values = {"steps": 100, "seeds": 1, "lrs": [1e-6, 1e-2], "prune": True, "kind": "labels", "validation_rows": 20}
    records = compare(prepared(place, tmp_path / "out", methods=["shira"], **values), LocalWorkers(1))
    pruned = [record for record in records if record["state"] == "pruned"]
    assert pruned
    assert all(record["lr"] == 1e-6 and not record["baseline"] for record in pruned)
    assert all(record.rungs() for record in pruned)
    assert {record["contender"] for record in records if record["chosen"]} == {"base", "linear-probe", "full", "lora", "shira"}


def test_a_second_comparison_in_the_folder_is_refused(place: Path, tmp_path: Path) -> None:
    comparison = prepared(place, tmp_path / "out", seeds=1)

    def watch(statuses: Any) -> None:
        with pytest.raises(GraftError, match="another graft compare is at work"):
            compare(comparison, LocalWorkers(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(comparison, LocalWorkers(1), watch)


def test_earlier_results_together(place: Path, done: tuple[Comparison, Answer], tmp_path: Path) -> None:
    first, _ = done
    other = prepared(place, tmp_path / "other", methods=["dora"], seeds=1)
    compare(other, LocalWorkers(2))
    records, _ = together([first.folder, other.folder])
    names = {record["contender"] for record in records}
    assert {"dora", "shira", "base", "lora", "lora (other)"} <= names | {"lora (other)"}
    assert len({(r["contender"], r["lr"], r["seed"]) for r in records}) == len(records)
    runner = CliRunner().invoke(app, ["compare", "--load", str(first.folder), str(other.folder), "--output", str(tmp_path / "both"), "--json"])
    assert runner.exit_code == 0, runner.output
    assert {entry["name"] for entry in json.loads(runner.stdout)["table"]} == {r["contender"] for r in records if r["chosen"]}
    assert [record.predictions() for record in load_records(tmp_path / "both") if record["chosen"]]
    elsewhere = prepared(place, tmp_path / "elsewhere", seeds=1, test_rows=9)
    compare(elsewhere, LocalWorkers(2))
    with pytest.raises(GraftError, match="other test rows"):
        together([first.folder, elsewhere.folder])


def test_predictions_that_were_edited_are_refused(place: Path, tmp_path: Path) -> None:
    comparison = prepared(place, tmp_path / "out", seeds=1, lrs=[1e-3], tune="none")
    records = compare(comparison, LocalWorkers(2))
    path = comparison.folder / records[0]["predictions"]
    path.write_text(path.read_text().replace('"correct": false', '"correct": true') + "\n")
    with pytest.raises(GraftError, match="its hash differs"):
        Answer(load_records(comparison.folder)).entries  # noqa: B018 - computed when it is asked for


# ---- contenders and sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["answers", "labels", "text"])
def test_baselines_are_always_there(kind: Any) -> None:
    names = [each.name for each in contenders(CompareConfig.make({"data": "d", "output": "o", "methods": ["dora", "lora", "full"]}), kind)]
    third = {"answers": ["few-shot"], "labels": ["linear-probe"], "text": []}[kind]
    assert names == ["base", *third, "full", "lora", "dora"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("doras", "there is no method 'doras'"), ("lora:rnk=2", "no option 'rnk'"), ("lora:rank", "option=value"), ("base:x=1", "without options"),
     ("lora:rank=none", "rank")],
)  # fmt: skip
def test_methods_that_cannot_be(text: str, said: str) -> None:
    with pytest.raises(GraftError, match=said):
        parse(text)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "labels", "match": "number"}, "match = 'number' is for answers that are written, and these rows are labels"),
        ({"kind": "labels", "shots": 2}, "shots = 2 is for few-shot prompting, and these rows are labels"),
        ({"kind": "labels", "methods": ["few-shot"]}, "the baseline few-shot is not for rows of kind 'labels'"),
        ({"methods": ["linear-probe"]}, "the baseline linear-probe is not for rows of kind 'answers'"),
        ({"refine": True, "lrs": [1e-3]}, "refine tries rates around the best of several, but lrs has one"),
        ({"minutes": 5}, "minutes sets the number of updates, so steps cannot be given beside it"),
        ({"general": "nowhere.txt"}, "there is no data file nowhere.txt"),
    ],
)
def test_what_would_be_ignored_is_refused(place: Path, tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(GraftError, match=re.escape(said)):
        prepared(place, tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_the_last_number_counts_also_where_answers_are_few(place: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, count in (("train", 24), ("test", 8)):
        rows = [{"prompt": f"the {folders.WORDS[i % 20]} {name}", "answer": str(i % 3)} for i in range(count)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = prepared(place, tmp_path / "out", data=str(tmp_path / "data"), match="number", tune="none", lrs=[1e-3], seeds=1)
    assert {record["rule"].rpartition(", ")[2] for record in compare(comparison) if record["chosen"]} == {"last number"}


def test_a_method_named_twice() -> None:
    with pytest.raises(GraftError, match="twice"):
        contenders(CompareConfig.make({"data": "d", "output": "o", "methods": ["dora", "dora"]}), "text")


@pytest.mark.parametrize("name", ["lora", "dora", "shira", "adalora", "randlora", "s2ft", "hydra", "lora-xs", "nola", "fourierft"])
def test_a_budget_of_parameters_is_used_and_not_exceeded(name: str) -> None:
    model, limit = tiny.llama(), {"s2ft": 1000, "lora-xs": 2000, "nola": 2000, "fourierft": 2000}.get(name, 12_000)
    targets = {name: find_targets(model, catalogue[name].default_targets, catalogue[name].delta.kinds)}
    sized = within(parse(name), limit, targets)
    assert sized is not None
    count = catalogue[name].recipe(**sized.settings).delta.total(targets[name])
    trained = graft.attach(tiny.llama(), name, **sized.settings).parameter_count
    assert (0.6 if name == "randlora" else 0.7) * limit < count <= limit  # its sizes are few here
    assert trained == (count if name != "s2ft" else pytest.approx(count, rel=0.05))  # which rounds to whole channels
    assert within(parse(name), 1, targets) is None


def test_a_size_that_was_given_stays() -> None:
    targets = {"lora": find_targets(tiny.llama(), "linear")}
    sized = within(parse("lora:rank=2"), 10**6, targets)
    assert sized is not None
    assert sized.settings == {"rank": "2"}


def test_estimated_memory_is_within_a_factor_of_two(place: Path, tmp_path: Path) -> None:
    """Its time is tested on a real model (tests/real): an update of a few milliseconds is mostly noise."""
    comparison = prepared(place, tmp_path / "out", kind="labels", steps=40, seeds=1, tune="none", lrs=[1e-3], methods=["dora"])
    found = estimates(comparison)
    records = {record["contender"]: record for record in compare(comparison, LocalWorkers(1))}
    for name in ("full", "lora", "dora"):
        expected = found[name]
        assert isinstance(expected, Estimate)
        assert 0.5 < expected.memory / records[name]["peak_memory_bytes"] < 2


def test_a_budget_of_minutes_sets_the_updates(place: Path, tmp_path: Path) -> None:
    comparison = prepared(place, tmp_path / "out", kind="labels", seeds=1, tune="none", lrs=[1e-3], steps=None, minutes=2)
    assert comparison.config.steps > SMALL["steps"]
    again = prepared(place, tmp_path / "out", kind="labels", seeds=1, tune="none", lrs=[1e-3], steps=None, minutes=2)
    assert again.config.steps == comparison.config.steps
    with pytest.raises(GraftError, match="minutes are not enough"):
        prepared(place, tmp_path / "short", kind="labels", seeds=1, tune="none", lrs=[1e-3], steps=None, minutes=0.01)
    assert not any((tmp_path / "short").iterdir())  # so the next attempt is not met with "holds other files"
