"""Time and memory of a fine-tuning step against rank, sequence length and number of targets, Graft beside PEFT.

    python benchmarks/cost_curves.py
    python benchmarks/cost_curves.py --curves rank --values 8 64 --pairs 1 --steps 2

LoRA on SmolLM2-135M, alpha twice the rank, every position labelled; from 4 x 128 tokens, rank 8 and all linear maps one thing changes at a
time (ranks without k and v, which have no more than 192). The length goes from 64 to 2,048 at a constant 2,048 tokens a batch (32 x 64 to
1 x 2048): then the linear maps cost the same at every length, and what changes is attention. Token ids are random, since time does not
depend on them. Blocks run in processes of their own, in the order ours, PEFT, PEFT, ours, ... as in benchmarks/training_step.py.

From rank 64 on each pair in fp32 is followed by two blocks of ours: with the contraction planner at rates measured on this machine
("planned"), and with the thin order of products always ("thin"). Without either the planner counts operations; see kernels/plan.py.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
from common import RANK, SEED, SIDES, compare, compare_blocks, in_process, order, positive, ratio, table

BATCH, LENGTH, TOKENS = 4, 128, 2048  # TOKENS: of a batch, along the curve over lengths
STEPS, WARMUP = 3, 1
PLANNED, PLANNED_FROM = ("planned", "thin"), 64  # kinds of ours, and from which rank on

# What find_targets takes; "half" is all linear maps of the last half of the blocks, below which no gradient flows.
# k and v have 192 rows, and no update of theirs has more ranks: ranks are varied on the other maps.
WIDE = "all but k, v"
TARGETS = {WIDE: ["q", "o", "gate", "up", "down"], "q, v": ["q", "v"], "attention": "attention", "last half": "half", "all linear": "linear"}


class Point(NamedTuple):
    """One point of a curve."""

    curve: str
    value: Any
    rank: int = RANK
    targets: str = "all linear"
    batch: int = BATCH
    length: int = LENGTH


CURVES = {
    "rank": [Point("rank", rank, rank=rank, targets=WIDE) for rank in (4, 8, 16, 32, 64, 128, 256)],
    "length": [Point("length", length, batch=TOKENS // length, length=length) for length in (64, 128, 256, 512, 1024, 2048)],
    "targets": [Point("targets", name, targets=name) for name in TARGETS if name != WIDE],
}


# ---- arithmetic ---------------------------------------------------------------------------------------------------------


def kinds(point: Point, dtype: str, pairs: int) -> list[str]:
    """The blocks of a point in order: pairs of ours and PEFT, each followed by a pair of ours where the planner may choose."""
    extra = PLANNED if point.rank >= PLANNED_FROM and dtype == "float32" else ()
    return [kind for pair in order(pairs) for kind in (*pair, *extra)]


def summary(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and memory of ours and PEFT at one point; of planned and thin where they ran."""
    found = compare_blocks(blocks)
    own = {kind: [block for block in blocks if block["side"] == kind] for kind in PLANNED}
    if own["planned"]:
        seconds = {kind: [statistics.median(block["seconds"]) for block in each] for kind, each in own.items()}
        memory = {kind: [block["memory"] / common.MIB for block in each] for kind, each in own.items()}
        found["planner"] = {"seconds": compare(**seconds), "memory_mib": compare(**memory), "plans": own["planned"][0]["plans"]}
    return found


# ---- what a process of its own does ---------------------------------------------------------------------------------------


def measure(side: str, dtype: str, steps: int, point: Sequence[Any]) -> dict[str, Any]:
    """One block of steps."""
    import torch

    import graft
    from graft.kernels import plan

    _, _, rank, targets, batch, length = point
    base, _ = graft.load("smollm2", dtype=dtype)
    if side == "planned":
        plan.use_rates(plan.measure(base.dtype), base.dtype)
    if side == "thin":
        plan.choose = lambda *shape: plan.THIN
    ids = torch.randint(len(base.get_input_embeddings().weight), (batch, length), generator=torch.Generator().manual_seed(SEED))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}]
    found = common.block(
        "peft" if side == "peft" else "ours", base, data, steps, WARMUP, rank=rank, targets=names(base, targets), task_type="CAUSAL_LM"
    )
    found["side"] = side
    if side == "planned":
        shapes = {(*base.get_submodule(name).weight.shape[::-1],) for name in names(base, targets)}
        found["plans"] = {f"{i} to {o}": str(plan.choose(plan.Shape(batch * length, i, o, rank), base.dtype)) for i, o in sorted(shapes)}
    return found


def names(base: Any, targets: str) -> list[str]:
    """The names of one of :data:`TARGETS`."""
    from graft.core.target import find_targets

    wanted = TARGETS[targets]
    if wanted != "half":
        return [target.name for target in find_targets(base, wanted)]
    return [t.name for t in find_targets(base, "linear") if t.depth is not None and t.depth >= base.config.num_hidden_layers // 2]


# ---- the whole run --------------------------------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> list[Point]:
    """The points that were asked for."""
    points = [point for curve in options.curves for point in CURVES[curve]]
    return [point for point in points if options.values is None or str(point.value) in options.values]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every point, with a progress bar."""
    results, wanted = [], [(point, dtype) for dtype in options.dtypes for point in chosen(options)]
    with common.progress(sum(len(kinds(*each, options.pairs)) * each[0].batch * each[0].length for each in wanted)) as show:
        for point, dtype in wanted:
            blocks = []
            for side in kinds(point, dtype, options.pairs):
                show(f"{point.curve} {point.value} {dtype}: {side}")
                blocks.append(in_process(__file__, "measure", side=side, dtype=dtype, steps=options.steps, point=point))
                show(f"{point.curve} {point.value} {dtype}", point.batch * point.length)
            results.append({**point._asdict(), "dtype": dtype, "blocks": blocks, **summary(blocks)})
    return {**common.conditions(__file__, options), "pairs": options.pairs, "steps": options.steps, "results": results}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    parts = []
    titles = {"rank": "Rank", "length": "Sequence length", "targets": "Targets"}
    for curve, title in titles.items():
        rows = []
        for result in (result for result in report["results"] if result["curve"] == curve):
            seconds, memory, planner = result["seconds"], result["memory_mib"], result.get("planner")
            cells = [str(result["value"]), result["dtype"], f"{result['batch']} x {result['length']}"]
            cells += [*(f"{seconds[side]['median']:.2f}" for side in SIDES), ratio(seconds["ratio"])]
            cells += [*(f"{memory[side]['median']:,.0f}" for side in SIDES), ratio(memory["ratio"])]
            if curve == "rank":
                cells += [ratio(planner[name]["ratio"]) if planner else "-" for name in ("seconds", "memory_mib")]
            rows.append(cells)
        header = [curve, "base", "batch", "ours s", "PEFT s", "ours / PEFT time", "ours MiB", "PEFT MiB", "ours / PEFT memory"]
        header += ["planned / thin time", "planned / thin memory"] if curve == "rank" else []
        if rows:
            parts.append(f"## {title}\n\n{table(header, rows)}\n\n![{title}](cost_curves_{curve}.png)")
    return f"""# What a step costs: rank, length, targets

LoRA on SmolLM2-135M, every position labelled, random token ids. One thing changes at a time from rank {RANK}, {BATCH} x {LENGTH}
tokens and all linear maps (ranks: on {WIDE}, whose 192 rows allow no more ranks); the length changes at {TOKENS:,} tokens a batch.
Seconds of the median step, MiB above the loaded model; {report["pairs"]} pairs of blocks of {report["steps"]} steps, ratios within pairs
with the lowest and the highest. Lower is better.

{(chr(10) * 2).join(parts)}

From rank {PLANNED_FROM} on, "planned" is ours with the order of products that `graft.kernels.plan` chooses at rates measured in the
block, "thin" ours without merged orders; plain ours counts operations (fp32 only: merged orders would round a bf16 base, and are not used
there). The chosen orders are in the JSON. "Last half" are all linear maps of the last half of the blocks.

{common.conditions_text(report)}"""


def draw(report: Mapping[str, Any], folder: Path) -> None:
    """Time and memory along each curve."""
    pyplot = common.plotter()
    for curve in CURVES if pyplot else ():
        results = [result for result in report["results"] if result["curve"] == curve]
        if not results:
            continue
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for panel, (name, label) in zip(panels, (("seconds", "seconds a step"), ("memory_mib", "MiB above the model")), strict=True):
            for dtype, line in (("float32", "-"), ("bfloat16", "--")):
                own = [result for result in results if result["dtype"] == dtype]
                lines = {side: ([r["value"] for r in own], [r[name][side]["median"] for r in own]) for side in SIDES}
                planned = [result for result in own if "planner" in result]
                lines["planned"] = ([r["value"] for r in planned], [r["planner"][name]["planned"]["median"] for r in planned])
                for side, color in (("ours", "tab:blue"), ("peft", "tab:orange"), ("planned", "tab:green")):
                    if lines[side][0]:
                        text = {"ours": "Graft", "peft": "PEFT", "planned": "Graft, planned"}[side]
                        panel.plot(*lines[side], line, color=color, marker="o", label=f"{text}, {dtype}")
            if curve != "targets":
                panel.set_xscale("log", base=2)
            panel.set(xlabel=curve, ylabel=label, ylim=(0, None))
            panel.legend()
        figure.savefig(folder / f"cost_curves_{curve}.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--curves", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--values", nargs="+", metavar="VALUE", help="only these points of the curves")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--pairs", type=positive, default=1, help="pairs of blocks for each point (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=STEPS, help="measured steps in a block (default: %(default)s)")
    options = common.options_of(parser, {"measure": measure})
    if not chosen(options):
        raise SystemExit(f"the curves have no such points; choose from {', '.join(str(p.value) for c in options.curves for p in CURVES[c])}.")
    report = run(options)
    common.write(options.output, "cost_curves", report, markdown(report))
    draw(report, options.output)


if __name__ == "__main__":
    main()
