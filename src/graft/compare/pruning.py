"""Successive halving: runs whose validation loss at a rung is clearly among the worse half stop there (Jamieson and Talwalkar, arXiv 1502.07943).

Optuna's pruner says which runs are in the worse half at a rung. Of those only runs stop whose losses on the validation rows are also
significantly above the best run's, row by row: a difference inside the noise drops nobody. Baselines are never stopped.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from graft.compare.job import RUNGS
from graft.compare.json_lines import read_lines
from graft.compare.plan import Run
from graft.core.errors import GraftError

P = 0.05


class Pruner:
    """Follows the rungs of all runs and says which are losing."""

    def __init__(self) -> None:
        try:
            import optuna
        except ImportError:
            raise GraftError("--prune needs optuna; run: pip install 'graft[compare]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2, min_early_stopping_rate=0)
        self.study = optuna.create_study(direction="minimize", pruner=pruner)
        self.trials: dict[Run, Any] = {}
        self.losses: dict[int, dict[Run, list[float]]] = {}

    def losing(self, run: Run, folder: Path, baseline: bool) -> bool:
        """Whether the run in ``folder`` should stop, after what it said at its rungs so far."""
        if run not in self.trials:
            self.trials[run] = self.study.ask()
        trial = self.trials[run]
        verdict = False
        for number, rung in enumerate(read_lines(folder / RUNGS, growing=True), 1):
            known = self.losses.setdefault(number, {})
            if run in known:
                continue
            known[run] = rung["losses"]
            trial.report(rung["metrics"]["loss"], number)
            verdict = trial.should_prune() and self._clearly(run, known)
        return verdict and not baseline

    def _clearly(self, run: Run, known: dict[Run, list[float]]) -> bool:
        from scipy import stats

        best = min(known, key=lambda other: sum(known[other]))
        if best == run:
            return False
        return bool(stats.ttest_rel(known[run], known[best], alternative="greater").pvalue < P)
