"""Share of padding among the tokens a model computes: padded or packed batches, in random or bucketed order, on movie reviews.

    python benchmarks/padding.py
    python benchmarks/padding.py --rows 800 --epochs 1

Counts the positions of real batches, as ``graft fit`` would collate them, over whole epochs. Nothing is timed and no model runs, so the
shares are the same on every machine.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import LABELS, SEED, command, examples, positive, reviews, table, versions, write

UPDATE = 4  # batches of an update, where gradients are accumulated
BATCHES, LENGTHS = (8, 16), (128, 256)
ORDERS = ("random", "update", "bucketed")


class Case(NamedTuple):
    """One kind of data and its tokenizer."""

    about: str
    model: str
    kind: str
    packs: bool


CASES = {
    "answers": Case("question and answer, SmolLM2", "smollm2", "answers", True),
    "text": Case("plain text, SmolLM2", "smollm2", "text", True),
    "labels": Case("classification, MiniLM", "minilm", "labels", False),
}


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def batches(rows: Iterable[int], size: int) -> list[list[int]]:
    """Consecutive rows, ``size`` of them to a batch; the last may be short."""
    rows = list(rows)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def share(examples: Sequence[dict[str, Any]], batched: Iterable[Sequence[int]], collate: Callable[..., dict[str, Any]]) -> tuple[float, float]:
    """The share of padding among all positions, and the mean number of rows of a batch."""
    from graft.data.batching import real_tokens

    real = positions = rows = count = 0
    for batch in batched:
        mask = real_tokens(collate([examples[index] for index in batch]))
        real, positions, rows, count = real + int(mask.sum()), positions + mask.numel(), rows + len(mask), count + 1
    return 1 - real / positions, rows / count


# ---- the whole run --------------------------------------------------------------------------------------------------------


def measure(case: Case, examples: Sequence[dict[str, Any]], size: int, epochs: int) -> dict[str, dict[str, float]]:
    """Shares by order, then by batch: padded, packed, and the rows of a packed batch; means over the epochs."""
    from graft.data.batching import BucketedOrder, DataOrder, packing_collator
    from graft.data.encoding import collator

    lengths = [len(example["input_ids"]) for example in examples]
    orders = (DataOrder(len(examples), SEED), BucketedOrder(lengths, size, SEED, pool=UPDATE), BucketedOrder(lengths, size, SEED))
    found: dict[str, dict[str, float]] = {}
    for name, order in zip(ORDERS, orders, strict=True):
        seen = []
        for epoch in range(epochs):
            order.set_epoch(epoch)
            batched = batches(order, size)
            one = {"padded": share(examples, batched, collator(0))[0]}
            if case.packs:
                one["packed"], one["rows"] = share(examples, batched, packing_collator(0))
            seen.append(one)
        found[name] = {key: sum(one[key] for one in seen) / epochs for key in seen[0]}
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every case at every batch size and length."""
    import graft

    rows, results = reviews(), []
    rows = rows[:: max(1, len(rows) // options.rows)]  # every n-th, since the file is sorted
    for name in options.cases:
        case = CASES[name]
        task: dict[str, Any] = {"task": "classification", "labels": LABELS} if case.kind == "labels" else {}
        _, tokenizer = graft.load(case.model, **task)
        for max_length in LENGTHS:
            data = examples(case.kind, rows, tokenizer, max_length)
            lengths = [len(example["input_ids"]) for example in data]
            about = {"examples": len(data), "median_length": statistics.median(lengths), "at_max_length": lengths.count(max_length) / len(lengths)}
            for size in BATCHES:
                shares = measure(case, data, size, options.epochs)
                results.append({"case": name, "max_length": max_length, "batch": size, **about, "shares": shares})
    return {
        "command": command(__file__, options),
        "versions": versions("graft", "transformers", "tokenizers"),
        "seed": SEED,
        "reviews": len(rows),
        "epochs": options.epochs,
        "results": results,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = []
    for result in report["results"]:
        shares = result["shares"]
        cells = [f"{100 * shares[order][how]:.1f} %" if how in shares[order] else "-" for how in ("padded", "packed") for order in ORDERS]
        rows = f"{shares['random']['rows']:.1f}" if "rows" in shares["random"] else "-"
        about = [CASES[result["case"]].about, str(result["max_length"]), f"{result['median_length']:.0f}", f"{100 * result['at_max_length']:.0f} %"]
        lines.append([*about, str(result["batch"]), *cells, rows])
    header = ["data", "max_length", "median length", "at max_length", "batch", "random", "by update", "bucketed", "packed", "packed, by update",
              "packed, bucketed", "rows of a packed batch"]  # fmt: skip
    return f"""# Share of padding

The share of padding tokens among all tokens of the batches, over {report["epochs"]} epochs of {report["reviews"]:,} movie reviews of all lengths.

{table(header, lines)}

- random: the order of `graft fit`, each batch padded to its longest example.
- bucketed: examples of similar length share a batch, drawn from pools of up to 50 batches.
- by update: the same in pools of {UPDATE} batches; with {UPDATE} accumulated batches an update has the examples it has in random order.
- packed: several examples share a row, in as few rows as first-fit decreasing finds; the last column says how many in random order. A
  classifier has one output a row, so its examples cannot share one.

Median length and the share of examples that were cut to `max_length` describe the data; plain text longer than that becomes several
examples. Counts, not times: the shares are the same on every machine.

## Conditions

- {", ".join(f"{name} {number}" for name, number in report["versions"].items())}, seed {report["seed"]}
- `{report["command"]}`
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=positive, default=4000, help="about how many reviews (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=3, help="epochs to average over (default: %(default)s)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="folder for padding.json and padding.md")
    options = parser.parse_args()
    report = run(options)
    write(options.output, "padding", report, markdown(report))


if __name__ == "__main__":
    main()
