"""The plan: the same search for everybody, test rows for the chosen rate only, and the same runs wherever it was interrupted."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from graft.compare.config import CompareConfig
from graft.compare.contenders import Contender
from graft.compare.plan import Run, Wanted, chosen_rate, wanted

LORA = Contender("lora", "lora")


def settings(**values: Any) -> CompareConfig:
    return CompareConfig.make({"data": "d", "output": "o", **values})


def ended(loss: float, accuracy: float | None = None, test: bool = False, state: str = "finished") -> dict[str, Any]:
    figures = {"loss": loss} | ({} if accuracy is None else {"accuracy": accuracy})
    return {"state": state, "validation": figures if state == "finished" else None, "test": figures if test else None}


def play(config: CompareConfig, contender: Contender, losses: dict[float, float], stop: int = 10**6) -> tuple[dict[Run, Any], list[Wanted]]:
    """Runs the plan to its end, or until ``stop`` runs have ended, one at a time."""
    results: dict[Run, Any] = {}
    done: list[Wanted] = []
    while (queue := wanted(contender, config, results)) and len(done) < stop:
        done.append(queue[0])
        rate = queue[0].run.lr
        results[queue[0].run] = ended(losses.get(rate, 5.0), test=queue[0].test)
    return results, done


def test_grid_then_the_neighbours_of_the_best_then_seeds() -> None:
    _, done = play(settings(seeds=3), LORA, {1e-4: 3.0, 1e-3: 1.0, 1e-2: 2.0, 3.16e-4: 0.9})
    assert [(each.run.lr, each.run.seed, each.test) for each in done] == [
        (1e-4, 0, False), (1e-3, 0, False), (1e-2, 0, False), (3.16e-4, 0, False), (3.16e-3, 0, False),
        (3.16e-4, 0, True), (3.16e-4, 1, True), (3.16e-4, 2, True),
    ]  # fmt: skip


def test_the_best_at_the_edge_is_followed_outward() -> None:
    _, done = play(settings(), LORA, {1e-2: 1.0})
    assert {each.run.lr for each in done} >= {3.16e-3, 3.16e-2}


@given(st.dictionaries(st.sampled_from([1e-4, 1e-3, 1e-2, 3.16e-5, 3.16e-4, 3.16e-3, 3.16e-2]), st.floats(0, 9)), st.integers(0, 9))
def test_everybody_gets_as_many_tries_and_interruptions_change_nothing(losses: dict[float, float], stop: int) -> None:
    config = settings()
    whole, done = play(config, LORA, losses)
    assert len([each for each in done if not each.test]) == 5
    assert {each.run.lr for each in done if each.test} == {chosen_rate("lora", config, whole)}
    results, _ = play(config, LORA, losses, stop)
    while queue := wanted(LORA, config, results):
        for each in queue:
            results[each.run] = ended(losses.get(each.run.lr, 5.0), test=each.test)
    assert set(results) == set(whole)


def test_accuracy_counts_before_the_loss_and_ties_go_to_the_smaller_rate() -> None:
    config = settings(refine=False)
    results = {Run("lora", rate, 0): ended(loss, accuracy) for rate, loss, accuracy in ((1e-4, 1.0, 0.5), (1e-3, 2.0, 0.7), (1e-2, 2.0, 0.7))}
    assert chosen_rate("lora", config, results) == 1e-3


def test_tries_that_failed_diverged_or_were_stopped_are_not_chosen() -> None:
    config = settings(refine=False)
    results = {
        Run("lora", 1e-4, 0): ended(9.0), Run("lora", 1e-3, 0): ended(float("nan")), Run("lora", 1e-2, 0): ended(0.0, state="failed"),
    }  # fmt: skip
    assert chosen_rate("lora", config, results) == 1e-4
    results = {Run("lora", rate, 0): ended(0.0, state="pruned") for rate in (1e-4, 1e-3, 1e-2)}
    assert wanted(LORA, config, results) == []


def test_without_tuning_there_is_one_rate() -> None:
    _, done = play(settings(tune="none", lrs=[2e-3], seeds=2), LORA, {})
    assert [(each.run.lr, each.run.seed, each.test) for each in done] == [(2e-3, 0, True), (2e-3, 1, True)]


def test_what_is_not_trained_runs_once_or_for_every_seed_of_its_examples() -> None:
    assert [each.run for each in play(settings(), Contender("base"), {})[1]] == [Run("base", None, 0)]
    assert [each.run.seed for each in play(settings(), Contender("few-shot", shots=4), {})[1]] == [0, 1, 2]


def test_a_seed_that_failed_leaves_the_others() -> None:
    config = settings(tune="none", lrs=[1e-3])
    results = {Run("lora", 1e-3, 0): ended(1.0, test=True), Run("lora", 1e-3, 1): ended(0.0, state="failed")}
    assert wanted(LORA, config, results) == [Wanted(Run("lora", 1e-3, 2), test=True)]
