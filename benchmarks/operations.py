"""Seconds of what happens around training: attach, save, load, merge, unmerge and detach, Graft beside PEFT.

    python benchmarks/operations.py
    python benchmarks/operations.py --dtypes float32 --pairs 1

LoRA of rank 8 on all linear maps of SmolLM2-135M. Each block runs in a process of its own: one cycle of all operations as a warm-up, then
some that count, each on fresh copies of the base, so that nothing is cached from one to the next. Blocks alternate (ours, PEFT, PEFT,
ours, ...), ratios are taken within pairs of neighbours.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
from common import RANK, SEED, SIDES, compare, in_process, order, positive, ratio, table

OPERATIONS = {
    "attach": ("`graft.attach`", "`get_peft_model`"),
    "save": ("`adapter.save`", "`save_pretrained`"),
    "merge": ("`adapter.merge`", "`merge_adapter`"),
    "unmerge": ("`adapter.unmerge`", "`unmerge_adapter`"),
    "detach": ("`graft.detach`", "`unload`"),
    "load": ("`graft.load_adapter`", "`PeftModel.from_pretrained`"),
}
CYCLES = 3  # of a block, after the warm-up


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def summary(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For each operation the medians of the blocks' cycles, compared in pairs; the goal is not to be slower."""
    found = {}
    for operation in OPERATIONS:
        series = {side: [statistics.median(c[operation] for c in b["cycles"]) for b in blocks if b["side"] == side] for side in SIDES}
        found[operation] = compare(**series)
        found[operation]["met"] = found[operation]["ratio"]["median"] <= 1
    return found


# ---- what a process of its own does ---------------------------------------------------------------------------------------


def measure(side: str, dtype: str, cycles: int) -> dict[str, Any]:
    """One block."""
    import graft

    base, _ = graft.load("smollm2", dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        found = [{"ours": ours, "peft": peft}[side](base, Path(folder) / str(cycle)) for cycle in range(cycles + 1)]
    return {"side": side, "cycles": found[1:], "warmup": found[0]}


def timed(found: dict[str, float], operation: str, work: Callable[[], Any]) -> Any:
    """What ``work`` returns; ``found`` gets its seconds, without those of collecting what the operations before it left."""
    gc.collect()
    start = time.perf_counter()
    result = work()
    found[operation] = time.perf_counter() - start
    return result


def ours(original: Any, folder: Path) -> dict[str, float]:
    """All operations once."""
    import graft

    found: dict[str, float] = {}
    base = copy.deepcopy(original)
    adapter = timed(found, "attach", lambda: graft.attach(base, "lora", rank=RANK, alpha=2 * RANK, seed=SEED))
    common.start_from(base, SEED, std=0.05)
    timed(found, "save", lambda: adapter.save(folder))
    timed(found, "merge", adapter.merge)
    timed(found, "unmerge", adapter.unmerge)
    timed(found, "detach", lambda: graft.detach(base))
    base = copy.deepcopy(original)
    timed(found, "load", lambda: graft.load_adapter(base, folder))
    return found


def peft(original: Any, folder: Path) -> dict[str, float]:
    """All operations once."""
    from peft import LoraConfig, PeftModel, get_peft_model

    from graft.core.target import find_targets

    found: dict[str, float] = {}
    base = copy.deepcopy(original)
    names = sorted({target.name.rsplit(".", 1)[-1] for target in find_targets(base, "linear")})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, task_type="CAUSAL_LM")
    network = timed(found, "attach", lambda: get_peft_model(base, config))
    common.start_from(network, SEED, std=0.05)
    timed(found, "save", lambda: network.save_pretrained(folder))
    timed(found, "merge", network.merge_adapter)
    timed(found, "unmerge", network.unmerge_adapter)
    timed(found, "detach", network.unload)
    base = copy.deepcopy(original)
    timed(found, "load", lambda: PeftModel.from_pretrained(base, folder))
    return found


# ---- the whole run --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures both dtypes, with a progress bar."""
    cases = []
    with common.progress(2 * options.pairs * len(options.dtypes)) as show:
        for dtype in options.dtypes:
            blocks = []
            for side in (side for pair in order(options.pairs) for side in pair):
                show(f"{dtype}: {side}")
                blocks.append(in_process(__file__, "measure", side=side, dtype=dtype, cycles=CYCLES))
                show(dtype, 1)
            cases.append({"dtype": dtype, "blocks": blocks, "operations": summary(blocks)})
    return {**common.conditions(__file__, options), "pairs": options.pairs, "cases": cases}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    rows = []
    for case in report["cases"]:
        for operation, found in case["operations"].items():
            seconds = [f"{1000 * found[side]['median']:,.1f}" for side in SIDES]
            rows.append([operation, case["dtype"], *OPERATIONS[operation], *seconds, ratio(found["ratio"]), "met" if found["met"] else "**missed**"])
    header = ["operation", "base", "ours is", "PEFT is", "ours ms", "PEFT ms", "ours / PEFT", "goal: at most 1"]
    return f"""# Around training: Graft and PEFT

LoRA rank {RANK} on all linear maps of SmolLM2-135M. Milliseconds are the median block, a block's number the median of {CYCLES} cycles; ratios
are taken within pairs of neighbouring blocks: the median over {report["pairs"]} pairs, with the lowest and the highest. Lower is better.

{table(header, rows)}

The two do not do quite the same. Saving and loading in Graft write and check a hash of the adapter, a fingerprint of the base model's
weights and that every number is finite; PEFT does not check. Merging in PEFT overwrites W, and unmerging subtracts again, up to rounding;
Graft keeps W, writes the merged weight beside it and reports what rounding lost, and unmerging is exact.

{common.conditions_text(report)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=positive, default=6, help="pairs of blocks for each dtype (default: %(default)s)")
    options = common.options_of(parser, {"measure": measure})
    report = run(options)
    common.write(options.output, "operations", report, markdown(report))


if __name__ == "__main__":
    main()
