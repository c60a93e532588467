"""The report in a real browser, opened from disk: it sorts, fits, speaks to the keyboard and says nothing on the console."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graft.compare.answer import Answer, fraction, listed
from graft.compare.report import HTML, MARKDOWN, NAMED_POINTS, disagreements, figures, styles, worth_naming, write_reports
from graft.compare.results import FIELDS, Record
from graft.data.reading import Row, Table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "</script><script>document.title='broken'</script><b>bold</b>"


def record(folder: Path, name: str, seed: int, correct: np.ndarray, **values: Any) -> Record:
    """A line as a comparison writes it, with its predictions on disk."""
    path = folder / f"{name.replace(':', ',')}-{seed}.jsonl"
    rows = [{"row": i, "right": "yes", "said": "yes" if right else "no", "correct": bool(right), "loss": 0.5} for i, right in enumerate(correct)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = dict.fromkeys(FIELDS) | {
        "format": 1, "contender": name, "method": name.split(":")[0], "settings": {}, "baseline": name == "base", "lr": 1e-3, "seed": seed,
        "chosen": True, "state": "finished", "validation": {"loss": 0.4, "accuracy": 0.7},
        "test": {"accuracy": float(correct.mean()), "loss": 0.5, "rows": len(correct)},
        "rule": "likeliest of 2 answers", "predictions": path.name, "predictions_hash": hashlib.sha256(path.read_bytes()).hexdigest(),
        "forgetting": {"measure": "loss", "value": 0.01}, "trainable_parameters": 1000, "base_parameters": 10**6, "adapter_bytes": 4000,
        "peak_memory_bytes": 10**9, "step_seconds": 0.5, "seconds": 50.0, "mergeable": "exactly", "folder": f"runs/{name}/{seed}", "jobs": 1,
        "code": "c",
        "data": {"hashes": {"train": "t" * 64, "test": "e" * 64}, "rows": {"train": 10, "test": len(correct)}, "kind": "answers"},
        "base": {"name": "smollm2", "fingerprint": "f" * 32}, "versions": {"graft": "0.1.0"}, "machine": {"processor": "x", "threads": 2}, **values,
    }  # fmt: skip
    run = folder / line["folder"]
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 2 / i}) + "\n" for i in range(1, 41)))
    return Record(line, folder)


def drawn(folder: Path, chances: dict[str, float], rows: int = 200, seeds: int = 3, **values: dict[str, Any]) -> list[Record]:
    generator = np.random.default_rng(0)
    hard = generator.random(rows)
    found = []
    for name, chance in chances.items():
        if name == "base":
            own = {"method": "", "trainable_parameters": 0, "adapter_bytes": 0, "lr": None, "step_seconds": None}
            found.append(record(folder, name, 0, hard < chance, **own))
            continue
        found += [record(folder, name, seed, hard + 0.05 * generator.standard_normal(rows) < chance, **values.get(name, {})) for seed in range(seeds)]
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    ranks = {"ranks": {f"model.layers.{i}.{role}": i + 1 for i in range(4) for role in ("self_attn.q_proj", "mlp.up_proj")}}
    values = {"adalora": {"trainable_parameters": 5000, **ranks}, f"lora:{'x' * 60}": {"peak_memory_bytes": 2 * 10**9}}
    chances = {"base": 0.4, "lora": 0.8, "adalora": 0.79, "full": 0.6, f"lora:{'x' * 60}": 0.75, "dora": 0.8, "shira": 0.77}
    table = Table([Row({"prompt": f"{EVIL} {i} {'w' * 300}", "answer": "yes"}, "x") for i in range(200)], "answers", folder)
    write_reports(folder, Answer(drawn(folder, chances, **values)), table, ["graft", "compare", EVIL])
    return folder


# ---- the words -----------------------------------------------------------------------------------------------------------


def test_a_tie_is_called_a_tie(tmp_path: Path) -> None:
    answer = Answer(drawn(tmp_path, {"base": 0.4, "lora": 0.8, "dora": 0.8}, dora={"trainable_parameters": 200}))
    assert "nothing separates it from" in answer.text
    assert "Among them dora is within noise of lora with a fifth of its parameters" in answer.text or answer.entries[0].name == "dora"
    assert "Every trained method beats base" in answer.text


def test_what_only_seems_worse_is_not_called_tied(tmp_path: Path) -> None:
    """Seeds of the probe differ so much that three cannot prove anything, but all of them are far behind."""
    records = drawn(tmp_path, {"base": 0.2, "lora": 0.9, "dora": 0.9})
    for seed, chance in enumerate((0.3, 0.55, 0.8)):
        right = np.arange(200) < 200 * chance
        records.append(record(tmp_path, "probe", seed, right.astype(float), trainable_parameters=10, step_seconds=0.01, peak_memory_bytes=10**6))
    answer = Answer(records)
    assert "probe" in [entry.name for entry in answer.best]
    assert "probe" not in [entry.name for entry in answer.tied]
    assert "probe seems worse, but not beyond the chance of so many comparisons." in answer.text
    assert "probe is within noise" not in answer.text
    assert "probe trains in" not in answer.text


def test_a_winner_is_called_a_winner(tmp_path: Path) -> None:
    answer = Answer(drawn(tmp_path, {"base": 0.3, "lora": 0.9, "dora": 0.5}))
    assert answer.text.startswith("On this data lora is best: accuracy ")
    assert "significantly ahead of all others" in answer.text
    assert "dora is significantly worse than lora." in answer.text


def test_no_training_helps(tmp_path: Path) -> None:
    assert "No training beats base" in Answer(drawn(tmp_path, {"base": 0.7, "lora": 0.7, "dora": 0.68})).text


def test_what_has_no_result_is_named(tmp_path: Path) -> None:
    records = drawn(tmp_path, {"base": 0.3, "lora": 0.9})
    records.append(record(tmp_path, "dora", 0, np.ones(3), chosen=False, state="failed", error="memory ended.", test=None))
    assert "dora has no result (memory ended)" in Answer(records).text


def test_lists_and_shares() -> None:
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [fraction(share) for share in (0.5, 0.2, 0.33, 0.42, 0.001)] == ["half", "a fifth", "a third", "42 %", "1/1,000"]


def test_more_names_than_a_reader_takes_in_are_counted() -> None:
    names = [f"m{i}" for i in range(13)]
    assert listed(names) == "m0, m1, m2 and 10 others"
    assert listed(names[:12]).endswith("m10 and m11")


def test_of_two_groups_the_smaller_one_is_named(tmp_path: Path) -> None:
    chances = {"base": 0.4, "lora": 0.9, "dora": 0.41, "shira": 0.4, "eva": 0.39}
    assert "Only lora beats base (" in Answer(drawn(tmp_path, chances)).text
    chances = {"base": 0.4, "lora": 0.9, "dora": 0.88, "shira": 0.87, "eva": 0.4}
    assert "eva does not beat base (" in Answer(drawn(tmp_path, chances)).text


def test_the_verdict_of_each_is_what_the_words_say(tmp_path: Path) -> None:
    records = drawn(tmp_path, {"base": 0.2, "lora": 0.9, "dora": 0.9})
    for seed, chance in enumerate((0.3, 0.55, 0.8)):
        records.append(record(tmp_path, "probe", seed, (np.arange(200) < 200 * chance).astype(float)))
    answer = Answer(records)
    verdicts = {entry.name: answer.verdict(entry) for entry in answer.entries}
    first, second = (entry.name for entry in answer.entries[:2])
    assert verdicts == {first: "best", second: "tied", "probe": "seems worse", "base": "worse"}


def test_a_learning_rate_at_the_end_of_the_search_is_said(tmp_path: Path) -> None:
    records = drawn(tmp_path, {"base": 0.3, "lora": 0.9, "dora": 0.8, "eva": 0.8})  # all with 1e-3
    others = {"lora": (1e-4, 1e-2), "dora": (1e-5, 1e-4), "eva": (1e-2, 1e-1)}
    records += [record(tmp_path, name, 9, np.ones(3), chosen=False, test=None, lr=lr) for name, lrs in others.items() for lr in lrs]
    answer = Answer(records)
    assert answer.at_edge == {"lowest": ["eva"], "highest": ["dora"]}
    assert "the chosen learning rate is the lowest that was tried for eva and the highest that was tried for dora, so rates" in answer.text
    assert "learning rate" not in Answer(drawn(tmp_path, {"base": 0.3, "lora": 0.9})).text  # one rate was not searched


def test_of_many_points_those_bear_names_that_nothing_cheaper_reaches(tmp_path: Path) -> None:
    rows = np.arange(100)
    sizes = {f"m{i}": (90 - i, 1000 - 10 * i if i % 3 == 0 else 2000) for i in range(20)}  # every third: the cheapest so far
    records = [record(tmp_path, name, 0, rows < right, trainable_parameters=size) for name, (right, size) in sizes.items()]
    few = Answer(records[:NAMED_POINTS])
    assert worth_naming(few, "parameters") == set(few.names)
    assert worth_naming(Answer(records), "parameters") == {f"m{i}" for i in range(0, 20, 3)} | {"m19"}


def test_disagreements_are_those_of_the_majority(tmp_path: Path) -> None:
    right = {"lora": [[1, 0, 1], [1, 0, 0], [1, 1, 0]], "dora": [[1, 1, 0], [1, 1, 0], [1, 1, 1]]}
    records = [record(tmp_path, name, seed, np.array(row)) for name, rows in right.items() for seed, row in enumerate(rows)]
    table = Table([Row({"prompt": f"row {i}", "answer": "yes"}, "x") for i in range(3)], "answers", tmp_path)
    assert [(each["row"], each["answers"]) for each in disagreements(Answer(records), table)] == [(1, {"dora": "yes", "lora": "no"})]


def test_markdown_has_the_answer_the_table_and_the_conditions(report: Path) -> None:
    text = (report / MARKDOWN).read_text()
    assert "On this data" in text
    assert text.count("\n| ") == 2 + 7
    assert "sha256" in text
    assert (report / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_contender_looks_the_same_in_all_figures_and_like_no_other(tmp_path: Path) -> None:
    names = [f"lora:rank={rank}" for rank in range(1, 30)]  # more than there are colours
    answer = Answer([record(tmp_path, name, 0, np.ones(3), lr=1e-3) for name in names])
    own = styles(answer)
    assert len(set(own.values())) == len(names)
    traces = [trace for figure in figures(answer) for trace in json.loads(figure["json"])["data"] if trace["type"] == "scatter"]
    assert len(traces) == 5 * len(names)
    for trace in traces:
        colour, line = own[trace["name"]]
        assert trace.get("line", {"color": colour, "dash": line}) == {"color": colour, "dash": line}
        assert trace.get("marker", {"color": colour})["color"] == colour


# ---- in the browser --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; .ci/run installs Debian's")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as launched:
            yield launched


@pytest.fixture(params=[1280, 400])
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with browser.new_page(viewport={"width": request.param, "height": 800}) as page:
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda asked: said.append(asked.url) if not asked.url.startswith(("file:", "data:", "blob:")) else None)
        page.goto((report / HTML).as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        yield page
        assert said == []


def test_nothing_overflows(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("[...document.querySelectorAll('.plot, .answer, dl, summary')].every(e => e.getBoundingClientRect().right <= innerWidth)")


def test_data_cannot_become_part_of_the_page(page: Any) -> None:
    assert page.title() == "Graft comparison"
    assert page.locator("b", has_text="bold").count() == 0
    page.locator("summary").first.click()
    assert EVIL in page.locator("details pre").first.inner_text()


def test_columns_sort_by_mouse_and_by_keyboard(page: Any) -> None:
    def column(index: int) -> list[float]:
        return [float(cell.get_attribute("data-value")) for cell in page.locator(f"#methods tbody td:nth-child({index})").all()]

    header = page.locator("#methods th").nth(3)
    header.locator("button").click()
    assert column(4) == sorted(column(4), reverse=True)
    assert header.get_attribute("aria-sort") == "descending"
    header.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(4) == sorted(column(4))
    assert header.get_attribute("aria-sort") == "ascending"


def test_everything_that_does_something_is_reached_by_the_keyboard(page: Any) -> None:
    seen = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.closest('th') ? 'header' : document.activeElement.tagName"))
    assert {"header", "SUMMARY", "DIV"} <= seen


def test_points_answer_to_hovering(page: Any) -> None:
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .points path").first
    point.hover(force=True)
    page.wait_for_selector(".hoverlayer .hovertext")
    assert "%" in page.locator(".hoverlayer .hovertext").first.text_content()


def test_figures_that_are_promised(page: Any) -> None:
    titles = page.locator(".figures h3").all_inner_texts()
    for title in ("Accuracy against trainable parameters", "Accuracy against peak memory (GB)", "Accuracy against seconds of training",
                  "Learning curves", "Search for the learning rate", "Paired differences", "Ranks of adalora"):  # fmt: skip
        assert title in titles
