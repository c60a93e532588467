"""The comparisons of docs/results: `graft compare` over the catalogue on real data, base models from packages.

    python benchmarks/comparisons.py --data ../shared/data --runs runs/comparisons
    python benchmarks/comparisons.py --only agnews-minilm

MiniLM labels (agnews, imdb) with every method of the catalogue; SmolLM2 answers (arc-easy by choice; arithmetic by writing: trained on
math-rationales, tested on multiarith). A comparison that was stopped goes on; its reports are copied to docs/results at the end of each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import graft

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
SOME = ("dora", "shira", "galore", "randlora", "s2ft", "lora-ga")  # beside the baselines, for SmolLM2
SMOLLM2 = {"model": "smollm2", "dtype": "bfloat16", "batch_size": 8, "refine": False, "seeds": 3}
CASES: dict[str, dict[str, Any]] = {
    "agnews-minilm": {"data": "agnews", "model": "minilm", "steps": 40, "batch_size": 16, "max_length": 96},
    "imdb-minilm": {"data": "imdb", "model": "minilm", "steps": 40, "batch_size": 8, "max_length": 160},
    "arc-easy-smollm2": {**SMOLLM2, "data": "arc-easy", "methods": SOME, "steps": 30, "max_length": 160, "test_rows": 200, "validation_rows": 60},
    "arithmetic-smollm2": {
        **SMOLLM2, "data": "arithmetic", "methods": SOME, "steps": 30, "max_length": 224, "test_rows": 60, "validation_rows": 60, "match": "number",
    },
}  # fmt: skip


def arithmetic(source: Path, folder: Path) -> Path:
    """Questions with their rationale as what is to be written; the held-out ones are multiarith's, with the bare number."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, name, answer in (("train", "math-rationales", "rationale"), ("test", "multiarith", "answer")):
        lines = (source / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [{"prompt": row["prompt"].strip(), "answer": row[answer].removeprefix("\nA:").strip()} for row in map(json.loads, lines)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["answer"]), encoding="utf-8")
    return folder


def run(name: str, source: Path, runs: Path) -> None:
    """One comparison, and its reports into docs/results."""
    settings = dict(CASES[name])
    data = arithmetic(source, runs / "data" / "arithmetic") if settings["data"] == "arithmetic" else source / settings["data"]
    settings.setdefault("methods", [method.name for method in graft.methods()])
    output = runs / name
    config = runs / f"{name}.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps({**settings, "methods": list(settings["methods"]), "data": str(data), "output": str(output)}, indent=1))
    subprocess.run([sys.executable, "-m", "graft", "compare", "--config", str(config)], check=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    page = (
        (output / "report.md")
        .read_text(encoding="utf-8")
        .replace("report.png", f"compare-{name}.png")
        .replace("results.jsonl", f"compare-{name}.jsonl")
    )
    (RESULTS / f"compare-{name}.md").write_text(page.replace("# Comparison", f"# {name}", 1), encoding="utf-8")
    shutil.copy(output / "report.png", RESULTS / f"compare-{name}.png")
    shutil.copy(output / "results.jsonl", RESULTS / f"compare-{name}.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with the data sets (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "comparisons", help="folder for the runs (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="only these comparisons")
    options = parser.parse_args()
    for name in options.only:
        run(name, options.data, options.runs)


if __name__ == "__main__":
    main()
