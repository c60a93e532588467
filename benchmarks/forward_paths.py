"""Each method's own forward beside the plain one, which forms W' and multiplies once: the faster path must never be the slower one.

    python benchmarks/forward_paths.py
    python benchmarks/forward_paths.py --methods loha oft --rounds 20

Forward and backward of one adapted map on 4 x 128 tokens, for the three shapes of SmolLM2-135M's blocks, with the method's defaults.
The two paths take turns in one process; ratios are taken within pairs of neighbours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import common
from common import SEED, compare, positive, ratio, table

SHAPES = ((576, 576), (1536, 576), (576, 1536))
TOKENS, WARMUP = 512, 3
NOISE = 1.1  # equal paths differ by less than this between neighbours


def measure(method: str, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Seconds of both paths in turns."""
    import torch
    from torch import nn

    import graft
    from graft.core.delta import Delta

    torch.manual_seed(SEED)
    out_features, in_features = shape
    model = nn.Sequential()
    model.down_proj = nn.Linear(in_features, out_features)  # a role that every method adapts
    (delta,) = graft.attach(model, method, targets="all", seed=SEED).deltas.values()
    x = torch.randn(4, TOKENS // 4, in_features)
    direction = torch.randn(4, TOKENS // 4, out_features)

    def once(path: Callable[[Any], Any]) -> float:
        delta.zero_grad()
        leaf = x.clone().requires_grad_(True)
        start = time.perf_counter()
        path(leaf).backward(direction)
        return time.perf_counter() - start

    paths = {"own": delta.train().forward, "plain": lambda leaf: Delta.forward(delta, leaf)}
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(WARMUP + rounds):
        for name in sorted(paths, reverse=bool(number % 2)):
            taken = once(paths[name])
            if number >= WARMUP:
                seconds[name].append(taken)
    return {"method": method, "shape": list(shape), "own_path": type(delta).forward is not Delta.forward, **compare(**seconds)}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every method on every shape."""
    import graft

    rows = [row for row in graft.methods() if row.axis == "delta" and row.name != "full" and not row.needs]
    chosen = options.methods or [row.name for row in rows]
    cases = []
    with common.progress(len(chosen) * len(SHAPES)) as show:
        for name in chosen:
            for shape in SHAPES:
                show(f"{name} {shape[0]} x {shape[1]}")
                cases.append(measure(name, shape, options.rounds))
                show(name, 1)
    return {**common.conditions(__file__, options), "rounds": options.rounds, "cases": cases}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    names = list(dict.fromkeys(case["method"] for case in report["cases"]))
    rows = []
    for name in names:
        cases = [case for case in report["cases"] if case["method"] == name]
        worst = max(case["ratio"]["median"] for case in cases)
        own = cases[0]["own_path"]
        verdict = "-" if not own else "met" if worst <= NOISE else "**missed**"
        rows.append(
            [name, "own" if own else "plain", *(f"{1000 * c['own']['median']:.1f}" for c in cases), *(ratio(c["ratio"]) for c in cases), verdict]
        )
    shapes = [f"{out} x {width}" for out, width in SHAPES]
    header = ["method", "forward", *(f"{shape}, ms" for shape in shapes), *(f"{shape}, own / plain" for shape in shapes), "never slower"]
    return f"""# Forward paths

Forward and backward of one adapted map on {TOKENS} tokens in fp32, each method with its defaults: its own path over the plain one, which
forms W' and multiplies once. Medians of {report["rounds"]} pairs of neighbours, with the lowest and the highest. A method without a path of
its own runs the plain one twice, which shows the noise; up to {NOISE:g} counts as equal.

{table(header, rows)}

{common.conditions_text(report)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="only these methods")
    parser.add_argument("--rounds", type=positive, default=20, help="pairs for each shape (default: %(default)s)")
    options = common.options_of(parser, {})
    report = run(options)
    common.write(options.output, "forward_paths", report, markdown(report))


if __name__ == "__main__":
    main()
