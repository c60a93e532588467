"""Which runs a comparison wants next: a function of the settings and of the results so far, so that a killed comparison just goes on.

For each contender: the learning rates of the grid with the first seed; then, between the best one and its neighbours, two more; then the
best of all with every seed. The best is chosen on the validation rows: by accuracy where it costs one forward pass, ties and everything
else by the loss. Only runs with the chosen learning rate see the test rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graft.compare.config import CompareConfig
from graft.compare.contenders import Contender

Results = Mapping["Run", Mapping[str, Any]]  # what result.json holds, of the runs that have ended


@dataclass(frozen=True)
class Run:
    """One run: a contender, its learning rate (None where nothing is trained) and seed."""

    contender: str
    lr: float | None
    seed: int

    @property
    def folder(self) -> str:
        """Its place below ``runs/``."""
        rate = "" if self.lr is None else f"lr={self.lr:.2e},"
        return f"{self.contender.replace(':', ',')}/{rate}seed={self.seed}"


@dataclass(frozen=True)
class Wanted:
    """A run that is wanted now; ``test`` once its learning rate is the chosen one."""

    run: Run
    test: bool


def wanted(contender: Contender, config: CompareConfig, results: Results) -> list[Wanted]:
    """What is to be run now for one contender; empty once it is complete."""
    rate = None
    if contender.trains:
        tried = search(contender.name, config, results)
        missing = [Wanted(run, test=False) for run in tried if run not in results]
        if missing and (config.tune == "lr"):
            return missing
        rate = chosen_rate(contender.name, config, results)
        if rate is None:
            return []  # every try failed
    seeds = range(config.seeds if contender.draws else 1)
    runs = [Run(contender.name, rate, seed) for seed in seeds]
    return [Wanted(run, test=True) for run in runs if not complete(results.get(run))]


def complete(result: Mapping[str, Any] | None) -> bool:
    """Whether a run of the chosen learning rate needs no more work: it has seen the test rows, or cannot."""
    return result is not None and (result["state"] != "finished" or result["test"] is not None)


def search(name: str, config: CompareConfig, results: Results) -> list[Run]:
    """The runs of the search, those between the best and its neighbours once the grid is done."""
    runs = [Run(name, rate, 0) for rate in config.lrs]
    if config.tune == "none" or not config.refine or len(runs) == 1 or any(run not in results for run in runs):
        return runs
    best = best_of(runs, results)
    if best is None or best.lr is None:
        return runs
    step = math.sqrt(config.lrs[1] / config.lrs[0])
    return [*runs, *(Run(name, _rounded(rate), 0) for rate in (best.lr / step, best.lr * step))]


def _rounded(rate: float) -> float:
    """Three digits, which are enough for a learning rate and for a folder's name."""
    return float(f"{rate:.2e}")


def best_of(runs: Sequence[Run], results: Results) -> Run | None:
    """The run that did best on the validation rows, the smaller learning rate on a tie; None where none has finished."""
    finished = [run for run in runs if run in results and results[run]["state"] == "finished" and math.isfinite(results[run]["validation"]["loss"])]
    return min(finished, key=lambda run: (-_accuracy(results[run]), results[run]["validation"]["loss"], run.lr), default=None)


def _accuracy(result: Mapping[str, Any]) -> float:
    return float(result["validation"].get("accuracy", 0.0))


def chosen_rate(name: str, config: CompareConfig, results: Results) -> float | None:
    """The learning rate of a contender; None where every try failed."""
    if config.tune == "none":
        return config.lrs[0]
    best = best_of(search(name, config, results), results)
    return None if best is None else best.lr
