"""An update of every method beside LoRA's: SmolLM2 in bf16 on real rows, timed in pairs of neighbours.

    python benchmarks/method_steps.py
    python benchmarks/method_steps.py --methods boft vera --rounds 2

One process and one copy of the model: a block of updates with LoRA, one with a method, one with LoRA again, one with the next method, and so
on; a second round goes the other way round. Each block is divided by the LoRA blocks before and after it, so that what changes on the machine
meanwhile falls on both. Every method has its defaults; what is done is what docs/performance.md says: attach, fuse, keep freed memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import ROOT, SEED, compare, positive, ratio, table

BATCH, LENGTH, WARMUP, STEPS = 8, 96, 2, 4
TOTAL = 30  # updates that schedules are told of, as in docs/results/low-rank.md
REFERENCE = "lora"


def batches(tokenizer: Any, data: Path) -> list[Any]:
    """Batches of labelled rows as ``graft fit`` packs them, one for every update of a block."""
    from graft.data.batching import DataOrder, packing_collator
    from graft.data.encoding import encode
    from graft.data.reading import read

    rows = read(data)
    examples = encode(rows, tokenizer, LENGTH, rows.labels).examples
    order = list(DataOrder(len(examples), SEED))
    collate = packing_collator(tokenizer.pad_token_id)
    return [collate([examples[i] for i in order[start : start + BATCH]]) for start in range(0, BATCH * (WARMUP + STEPS), BATCH)]


def block(model: Any, method: str, data: Sequence[Any]) -> float:
    """Median seconds of an update, the first ones left out; the model is what it was afterwards."""
    import graft

    adapter = graft.attach(model, method, seed=SEED, calibration=data)
    fused = graft.fuse(model)
    seconds, _ = common.train(model, adapter.optimizer(lr=common.LEARNING_RATE, total_steps=TOTAL), data, WARMUP + STEPS)
    fused.undo()
    graft.detach(model)
    return statistics.median(seconds[WARMUP:])


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All blocks in turns."""
    import torch

    import graft
    from graft.training.memory import keep_freed

    torch.set_num_threads(common.THREADS)
    keep_freed()
    model, tokenizer = graft.load("smollm2", dtype="bfloat16")
    data = batches(tokenizer, options.data)
    chosen = options.methods or [row.name for row in graft.methods() if row.name != REFERENCE]
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    with common.progress(options.rounds * len(chosen)) as show:
        show(REFERENCE)
        before = block(model, REFERENCE, data)
        for number in range(options.rounds):
            for name in reversed(chosen) if number % 2 else chosen:
                show(name)
                own, after = block(model, name, data), block(model, REFERENCE, data)
                pairs[name] += [(own, before), (own, after)]
                before = after
                show(name, 1)
    cases = [{"method": name, **compare(own=[own for own, _ in found], lora=[lora for _, lora in found])} for name, found in pairs.items()]
    shapes = [list(batch["input_ids"].shape) for batch in data]
    return {**common.conditions(__file__, options), "rounds": options.rounds, "batches": shapes, "cases": cases}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows = [
        [case["method"], f"{case['own']['median']:.2f}", f"{case['lora']['median']:.2f}", ratio(case["ratio"])]
        for case in sorted(report["cases"], key=lambda case: case["ratio"]["median"])
    ]
    return f"""# An update of every method

SmolLM2-135M in bf16, {BATCH} rows of the file that the command below names packed into a batch, each method with its defaults: the median of
{STEPS} updates after {WARMUP} that are left out, over that of the LoRA blocks right before and right after. The ratio is the
median over these pairs, with the lowest and the highest.

{table(["method", "s / update", "LoRA beside it", "method / LoRA"], rows)}

{common.conditions_text(report)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--rounds", type=positive, default=1, help="times that all methods take their turn (default: %(default)s)")
    rows = Path(os.path.relpath(ROOT.parent / "shared" / "data" / "sst-2" / "train.jsonl"))
    parser.add_argument("--data", type=Path, default=rows, help="rows with prompt and answer (default: %(default)s)")
    options = common.options_of(parser, {})
    report = run(options)
    common.write(options.output, "method_steps", report, markdown(report))


if __name__ == "__main__":
    main()
