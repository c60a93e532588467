"""The comparisons of docs/results: `graft compare` over the catalogue on real data, base models from packages.

    python benchmarks/comparisons.py --data ../shared/data --runs runs/comparisons
    python benchmarks/comparisons.py --only agnews-minilm

MiniLM labels (agnews, imdb) with the first ten methods; SmolLM2 answers (arc-easy by choice; arithmetic by writing: trained on
math-rationales, tested on multiarith) with six of them; low-rank: the whole catalogue on SmolLM2. A comparison that was stopped goes
on; its reports are copied to docs/results at the end of each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import graft
from common import ratio, table
from graft.compare.answer import Answer, Entry
from graft.compare.results import load_records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
SOME = ["dora", "shira", "galore", "randlora", "s2ft", "lora-ga"]  # beside the baselines, which full and lora are among
ALL = ["adalora", "dora", "eva", "galore", "hydra", "lisa", "lora-ga", "randlora", "s2ft", "shira"]
MINILM = {"model": "minilm", "methods": ALL, "steps": 40}
SMOLLM2 = {
    "model": "smollm2", "methods": SOME, "lrs": [2e-4, 1e-3, 5e-3], "refine": False, "steps": 30, "dtype": "bfloat16", "batch_size": 8,
    "validation_rows": 60,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "agnews-minilm": {**MINILM, "data": "agnews", "batch_size": 16, "max_length": 96},
    "imdb-minilm": {**MINILM, "data": "reviews", "steps": 80, "batch_size": 8, "max_length": 96},
    "arc-easy-smollm2": {**SMOLLM2, "data": "arc-easy", "max_length": 160, "test_rows": 200},
    "low-rank": {**SMOLLM2, "data": "sst-2", "max_length": 96, "methods": None, "lrs": [3e-4, 3e-3, 3e-2, 3e-1], "also": ["delora:strength=1"]},
    "arithmetic-smollm2": {**SMOLLM2, "data": "arithmetic", "batch_size": 4, "max_length": 384, "test_rows": 60, "match": "number"},
}


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a line ends with a newline and nothing else, texts hold other separators."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def arithmetic(source: Path, folder: Path) -> Path:
    """Questions with their rationale as what is to be written, where there is one; the held-out ones are multiarith's, with the bare number."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name, answer in (("train", "math-rationales", "rationale"), ("test", "multiarith", "answer")):
        found = lines(source / name / f"{split}.jsonl")
        rows = [{"prompt": row["prompt"].strip(), "answer": row.get(answer, "").removeprefix("\nA:").strip()} for row in found]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["answer"]), encoding="utf-8")
    return folder


def reviews(source: Path, folder: Path) -> Path:
    """imdb's reviews without the question and the options before them, which would take most of the tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = lines(source / "imdb" / f"{split}.jsonl")
        texts = [{"text": row["prompt"].split("Option: Good, Bad \n")[1].removesuffix("Answer:").strip(), "label": row["answer"]} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), encoding="utf-8")
    return folder


def run(name: str, source: Path, runs: Path, jobs: int) -> None:
    """One comparison, and its reports into docs/results."""
    settings = dict(CASES[name])
    if settings["methods"] is None:
        settings["methods"] = [*(row.name for row in graft.methods() if row.name != "full"), *settings.pop("also")]
    make = {"arithmetic": arithmetic, "reviews": reviews}.get(settings["data"])
    data = make(source, runs / "data" / settings["data"]) if make else source / settings["data"]
    output = runs / name
    config = runs / f"{name}.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({**settings, "data": str(data), "output": str(output)}, indent=1))
    subprocess.run([sys.executable, "-m", "graft", "compare", "--config", str(config), "--jobs", str(jobs)], check=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    page = (output / "report.md").read_text(encoding="utf-8").replace("# Comparison", f"# {name}", 1)
    if CASES[name]["methods"] is None:
        page = page.replace("## Conditions", beside_lora(Answer(load_records(output))) + "## Conditions", 1)
    title = name if CASES[name]["methods"] is None else f"compare-{name}"
    for file in ("report.png", "results.jsonl"):
        page = page.replace(file, f"{title}{Path(file).suffix}")
        shutil.copy(output / file, RESULTS / f"{title}{Path(file).suffix}")
    page += f"\nMade by `python benchmarks/comparisons.py --only {name}`, which holds its settings.\n"
    (RESULTS / f"{title}.md").write_text(page, encoding="utf-8")


def beside_lora(answer: Answer) -> str:
    """Size, time and memory of each method over LoRA's, as a Markdown section; the best quality first."""
    (lora,) = (entry for entry in answer.entries if entry.name == "lora")
    cases = json.loads((ROOT / "benchmarks" / "results" / "method_steps.json").read_text(encoding="utf-8"))["cases"]
    times = {"lora": "1", **{case["method"]: ratio(case["ratio"]) for case in cases}}
    header = ["method", answer.measure, "parameters", "adapter, kB", *(f"{what} / LoRA" for what in ("parameters", "bytes", "memory", "s / update"))]

    def row(entry: Entry) -> list[str]:
        shares = [entry.parameters / lora.parameters, entry.adapter_bytes / lora.adapter_bytes, entry.memory_bytes / lora.memory_bytes]
        sizes = [f"{entry.parameters:,}", f"{entry.adapter_bytes / 1e3:,.1f}"]
        return [entry.name, answer.span(entry.quality), *sizes, *(f"{share:.3g}" for share in shares), times[entry.name.split(":")[0]]]

    return f"""## Beside LoRA

The seconds of an update are from [pairs of neighbours](../../benchmarks/results/method_steps.md), not from the runs above, which shared the machine.

{table(header, [row(entry) for entry in answer.entries if entry.parameters])}

"""


def from_here(text: str) -> Path:
    """A path relative to where the command runs, so that no page names a machine's folders."""
    return Path(os.path.relpath(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=from_here, default=from_here(ROOT.parent / "shared" / "data"), help="folder with the data sets (default: %(default)s)"
    )
    parser.add_argument("--runs", type=from_here, default=from_here(ROOT / "runs" / "comparisons"), help="folder for the runs (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="only these comparisons")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    options = parser.parse_args()
    for name in options.only:
        run(name, options.data, options.runs, options.jobs)


if __name__ == "__main__":
    main()
