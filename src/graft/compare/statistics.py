"""How sure a comparison can be: intervals and paired tests over seeds and examples.

A contender's scores are ``x [S, E]``: seed s, test example e, higher is better (right or wrong, or minus a loss). Both are samples: other
seeds would train another adapter, other rows would ask something else. So both are drawn again in the bootstrap (Owen, The pigeonhole
bootstrap, arXiv 0712.1111), and the paired test of a difference ``d [S, E]`` takes both as random effects. With the mean squares of a
two-way layout without repetition,

``var(mean d) = (MS_seeds + MS_examples - MS_rest) / (S E)``

and Satterthwaite's degrees of freedom; with one seed it is the paired t test over the examples. p-values of all pairs are corrected
together (Holm). A contender that does not depend on the seed has S = 1 and stands for all seeds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Scores = NDArray[np.float64]  # [S, E]
LEVEL, DRAWS = 0.95, 4000


@dataclass(frozen=True)
class Interval:
    """A mean and the interval that holds it."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """``first - second``: the mean difference with its interval, and the corrected p-value of there being none."""

    first: str
    second: str
    difference: Interval
    p: float

    @property
    def significant(self) -> bool:
        return self.p < 1 - LEVEL


def interval(scores: Scores, seed: int = 0) -> Interval:
    """The mean score and its bootstrap interval, seeds and examples drawn again."""
    seeds, examples = scores.shape
    generator = np.random.default_rng(seed)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS) / seeds
    by_example = generator.multinomial(examples, np.full(examples, 1 / examples), DRAWS) / examples
    means = ((by_seed @ scores) * by_example).sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(scores.mean()), float(low), float(high))


def differences(first: Scores, second: Scores) -> Scores:
    """``first - second`` by seed and example; one without seeds stands for all of the other's, else the seeds that both have count."""
    seeds = max(len(first), len(second)) if 1 in (len(first), len(second)) else min(len(first), len(second))
    return np.broadcast_to(first[:seeds], (seeds, first.shape[1])) - np.broadcast_to(second[:seeds], (seeds, second.shape[1]))


def paired_p(d: Scores) -> float:
    """The two-sided p-value of a mean difference of zero, seeds and examples as random effects."""
    seeds, examples = d.shape
    if not d.any():
        return 1.0
    mean = d.mean()
    by_seed, by_example = d.mean(1), d.mean(0)
    ms_examples = seeds * by_example.var(ddof=1) if examples > 1 else 0.0
    if seeds == 1:
        variance, freedom = ms_examples / examples, examples - 1.0
    else:
        ms_seeds = examples * by_seed.var(ddof=1)
        rest = d - by_seed[:, None] - by_example[None, :] + mean
        ms_rest = (rest**2).sum() / ((seeds - 1) * (examples - 1)) if examples > 1 else 0.0
        squares = max(ms_seeds + ms_examples - ms_rest, ms_seeds, ms_examples)  # the estimate of a variance component can fall below zero
        variance = squares / (seeds * examples)
        parts = ((ms_seeds, seeds - 1), (ms_examples, examples - 1), (ms_rest, (seeds - 1) * (examples - 1)))
        freedom = squares**2 / max(sum(square**2 / count for square, count in parts if count > 0), 1e-300)
    if variance <= 0:
        return 0.0  # the same difference everywhere
    return float(2 * stats.t.sf(abs(mean) / math.sqrt(variance), max(freedom, 1.0)))


def pairs(scores: Mapping[str, Scores]) -> list[Pair]:
    """Every pair of contenders, with p-values corrected over all of them (Holm)."""
    names = list(itertools.combinations(scores, 2))
    raw = {pair: paired_p(differences(scores[pair[0]], scores[pair[1]])) for pair in names}
    corrected: dict[tuple[str, str], float] = {}
    largest = 0.0
    for position, pair in enumerate(sorted(names, key=lambda pair: raw[pair])):
        largest = max(largest, min(1.0, raw[pair] * (len(names) - position)))
        corrected[pair] = largest
    return [Pair(*pair, interval(differences(scores[pair[0]], scores[pair[1]])), corrected[pair]) for pair in names]


def places(scores: Mapping[str, Scores], found: list[Pair]) -> dict[str, tuple[int, int]]:
    """The places that each contender may have: those that are significantly better stand before it, those that are worse behind."""
    better = dict.fromkeys(scores, 0)
    worse = dict.fromkeys(scores, 0)
    for pair in found:
        if pair.significant:
            winner, loser = (pair.first, pair.second) if pair.difference.mean > 0 else (pair.second, pair.first)
            worse[winner] += 1
            better[loser] += 1
    return {name: (1 + better[name], len(scores) - worse[name]) for name in scores}
