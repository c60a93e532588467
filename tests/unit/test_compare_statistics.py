"""Intervals and tests against closed forms, other libraries, and their own promises on drawn data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from graft.compare.statistics import LEVEL, differences, interval, paired_p, pairs, places


def drawn(generator: np.random.Generator, seeds: int, examples: int, of_seeds: float, of_examples: float, rest: float) -> np.ndarray:
    """Scores with mean zero and the given standard deviations of seeds, of examples and of what is left."""
    by_seed = of_seeds * generator.standard_normal((seeds, 1))
    by_example = of_examples * generator.standard_normal((1, examples))
    return by_seed + by_example + rest * generator.standard_normal((seeds, examples))


def test_one_seed_is_the_paired_t_test() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 1, 40))
    assert paired_p(differences(a, b)) == pytest.approx(stats.ttest_rel(a[0], b[0]).pvalue, rel=1e-9)


def test_seeds_that_say_the_same_count_as_one() -> None:
    d = np.random.default_rng(1).standard_normal((1, 50)) + 0.3
    assert paired_p(np.repeat(d, 3, 0)) == pytest.approx(stats.ttest_1samp(d[0], 0).pvalue, rel=1e-9)


def test_examples_that_say_the_same_leave_a_t_test_over_seeds() -> None:
    d = np.random.default_rng(2).standard_normal((4, 1)) + 0.5
    assert paired_p(np.repeat(d, 60, 1)) == pytest.approx(stats.ttest_1samp(d[:, 0], 0).pvalue, rel=1e-9)


@pytest.mark.parametrize(("of_seeds", "of_examples", "rest"), [(0, 1, 1), (0.3, 1, 1), (1, 0.2, 0.2), (0.05, 0.4, 0.4), (0, 0, 1)])
@pytest.mark.parametrize("seeds", [1, 3, 5])
def test_no_more_false_alarms_than_promised(of_seeds: float, of_examples: float, rest: float, seeds: int) -> None:
    if seeds == 1:
        of_seeds = 0  # one seed cannot know how much seeds differ
    generator, trials = np.random.default_rng(3), 1500
    alarms = sum(paired_p(drawn(generator, seeds, 60, of_seeds, of_examples, rest)) < 0.05 for _ in range(trials))
    assert alarms / trials < 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5 + 0.01


def test_differences_that_are_there_are_found() -> None:
    generator, trials = np.random.default_rng(4), 300
    found = sum(paired_p(drawn(generator, 3, 200, 0.02, 0.3, 0.3) + 0.12) < 0.05 for _ in range(trials))
    assert found / trials > 0.7


@pytest.mark.parametrize(("of_seeds", "of_examples", "rest"), [(0, 1, 0.5), (0.05, 1, 0.5), (0, 0.3, 1)])
def test_intervals_hold_the_mean_as_often_as_promised(of_seeds: float, of_examples: float, rest: float) -> None:
    generator, trials = np.random.default_rng(5), 300
    spans = [interval(drawn(generator, 3, 80, of_seeds, of_examples, rest)) for _ in range(trials)]
    held = sum(span.low <= 0 <= span.high for span in spans) / trials
    assert held > LEVEL - 0.05


def test_the_interval_is_a_bootstrap_over_seeds_and_examples() -> None:
    scores = (np.random.default_rng(6).random((3, 30)) < 0.7).astype(float)
    generator = np.random.default_rng(7)
    means = [scores[np.ix_(generator.integers(0, 3, 3), generator.integers(0, 30, 30))].mean() for _ in range(20_000)]
    span = interval(scores)
    assert span.mean == scores.mean()
    assert (span.low, span.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.015)


def test_a_contender_without_seeds_stands_for_all() -> None:
    base, trained = np.zeros((1, 5)), np.arange(15.0).reshape(3, 5)
    assert (differences(trained, base) == trained).all()
    assert (differences(base, trained) == -trained).all()
    assert differences(trained, np.zeros((2, 5))).shape == (2, 5)  # one seed failed


@given(st.integers(0, 10_000))
def test_holm(seed: int) -> None:
    generator = np.random.default_rng(seed)
    scores = {name: drawn(generator, 2, 12, 0, 1, 1) + generator.integers(0, 3) for name in "abcd"}
    raw = {pair: paired_p(differences(scores[pair[0]], scores[pair[1]])) for pair in itertools.combinations("abcd", 2)}
    for pair in pairs(scores):
        # by the definition: the largest of (number still in question) x p over all p up to this one
        own = raw[pair.first, pair.second]
        smaller = sorted(p for p in raw.values() if p <= own)
        assert pair.p == pytest.approx(min(1, max((len(raw) - i) * p for i, p in enumerate(smaller))), rel=1e-9)


def test_nothing_differs() -> None:
    same = (np.random.default_rng(8).random((3, 40)) < 0.5).astype(float)
    found = pairs({"a": same, "b": same.copy()})
    assert found[0].p == 1
    assert places({"a": same, "b": same}, found) == {"a": (1, 2), "b": (1, 2)}


def test_places_are_no_finer_than_the_evidence() -> None:
    generator = np.random.default_rng(9)
    scores = {name: drawn(generator, 3, 200, 0, 0.3, 0.3) + mean for name, mean in {"good": 1.0, "as good": 1.0, "bad": 0.0}.items()}
    assert places(scores, pairs(scores)) == {"good": (1, 2), "as good": (1, 2), "bad": (3, 3)}
