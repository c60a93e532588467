"""The arithmetic of benchmarks/training_step.py and benchmarks/common.py, on numbers worked out by hand."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import common
import graft
import training_step as bench
from tests.tiny import llama

MIB = 2**20


def test_blocks_run_in_the_order_a_b_b_a() -> None:
    ours, peft = "ours", "peft"
    assert common.order(1) == [(ours, peft)]
    assert [side for pair in common.order(4) for side in pair] == [ours, peft, peft, ours, ours, peft, peft, ours]


def test_speed_comes_from_the_median_step() -> None:
    assert common.tokens_per_second([0.5, 9.0, 0.4], 512) == 1024  # the disturbed step of 9 s does not count
    assert common.tokens_per_second([0.25, 0.75], 100) == 200


def test_spread() -> None:
    assert common.spread([3.0, 1.0, 2.0, 10.0]) == {"median": 2.5, "low": 1.0, "high": 10.0}
    assert common.ratio({"median": 0.555, "low": 0.5, "high": 1.0}) == "0.56 (0.50 to 1.00)"


def test_ratios_are_taken_within_the_pairs() -> None:
    found = common.compare(ours=[100.0, 30.0, 80.0], peft=[50.0, 20.0, 80.0])
    assert found["ratio"] == {"median": 1.5, "low": 1.0, "high": 2.0}  # 2, 1.5, 1; the ratio of the medians would be 1.6
    assert found["ours"]["median"] == 80
    assert found["peft"]["median"] == 50


def test_sides_with_unequal_numbers_of_blocks_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="zip"):
        common.compare(ours=[1.0, 2.0], peft=[1.0])


BLOCKS: list[dict[str, Any]] = [
    {"side": "ours", "seconds": [1.0, 1.0], "tokens": 400, "memory": 30 * MIB},
    {"side": "peft", "seconds": [2.0, 2.0], "tokens": 400, "memory": 40 * MIB},
    {"side": "floor", "seconds": 0.5},
    {"side": "peft", "seconds": [8.0, 8.0], "tokens": 400, "memory": 40 * MIB},
    {"side": "ours", "seconds": [2.0, 2.0], "tokens": 400, "memory": 10 * MIB},
    {"side": "floor", "seconds": 2.0},
]


def test_summary_pairs_blocks_whatever_side_ran_first() -> None:
    found = bench.summary("minilm", "bfloat16", BLOCKS)
    assert found["tokens_per_second"]["ours"] == {"median": 300, "low": 200, "high": 400}
    assert found["tokens_per_second"]["peft"] == {"median": 125, "low": 50, "high": 200}
    assert found["seconds"]["ratio"] == {"median": 0.375, "low": 0.25, "high": 0.5}
    assert found["memory_mib"]["ratio"] == {"median": 0.5, "low": 0.25, "high": 0.75}
    assert found["floor"]["ratio"] == {"median": 1.5, "low": 1.0, "high": 2.0}
    assert found["goals"] == {}  # none is set for this case


def test_goals_are_met_or_missed_by_the_medians() -> None:
    found = bench.summary("smollm2", "float32", BLOCKS)
    assert found["goals"] == {"time": {"goal": 0.55, "met": True}, "memory": {"goal": 0.5, "met": True}, "floor": {"goal": 1.3, "met": False}}
    assert bench.judged(found, "memory", found["memory_mib"]["ratio"]) == "0.50 (0.25 to 0.75), goal 0.5: met"
    assert bench.judged(found, "floor", found["floor"]["ratio"]) == "1.50 (1.00 to 2.00), goal 1.3: **missed**"
    assert bench.judged(found, "other", {"median": 1, "low": 1, "high": 1}) == "1.00 (1.00 to 1.00)"


def test_products_of_a_step() -> None:
    first, other = bench.Map(12, 6, 10, input_gradient=False), bench.Map(6, 12, 10, input_gradient=True)
    found = bench.products([first, first, other], head=bench.Map(100, 6, 3, True), rank=2)
    assert found == {
        ("nt", 10, 12, 6): 2, ("nt", 10, 2, 6): 2, ("nt", 10, 12, 2): 2,  # x W^T, x A^T, thin B^T of the two that read the embeddings
        ("nn", 10, 2, 12): 2, ("tn", 2, 6, 10): 3, ("tn", 2, 12, 10): 3,  # g B; their dA is as large as the other's dB, and the reverse
        ("nt", 10, 6, 12): 1, ("nt", 10, 2, 12): 1, ("nt", 10, 6, 2): 1, ("nn", 10, 2, 6): 1,
        ("nn", 10, 12, 6): 1, ("nn", 10, 12, 2): 1,  # g W, back A of the other
        ("nt", 3, 100, 6): 1, ("nn", 3, 6, 100): 1,  # the head
    }  # fmt: skip
    operations = sum(2 * m * n * k * count for (_, m, n, k), count in found.items())
    assert operations == 5760 + 6000 + 7200  # four large products of 1440; thin ones; the head's two of 3600


def test_the_first_blocks_q_k_v_need_no_input_gradient() -> None:
    model = llama()
    graft.attach(model, "lora", rank=2)
    ids = torch.arange(10).view(2, 5)
    found = bench.maps(model, {"input_ids": ids, "labels": ids})
    assert [each.rows for each in found] == [10] * len(found)
    assert len(found) == 7 * model.config.num_hidden_layers
    assert [each.input_gradient for each in found[:4]] == [False, False, False, True]
    assert all(each.input_gradient for each in found[3:])
    head = bench.head(model, [{"labels": torch.tensor([[-100, -100, 5, 6]])}])
    assert head == bench.Map(model.config.vocab_size, model.config.hidden_size, 2, True)
    assert bench.head(model, [{"labels": torch.tensor([0, 1])}]) is None


def test_floor_is_the_sum_over_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "product_seconds", lambda product, count, dtype, repeats: product[1] * count)
    assert bench.floor([("nt", 3, 1, 1, 10), ("nn", 4, 1, 1, 2)], "float32", 1)["seconds"] == 38


@pytest.mark.parametrize("layout", ["nt", "nn", "tn"])
def test_every_layout_is_a_product(layout: str) -> None:
    assert bench.product_seconds((layout, 3, 4, 5), 2, "bfloat16", 2) > 0


def test_losses_agree_as_well_as_their_worst_step() -> None:
    assert bench.loss_difference([2.0, 1.5, 1.0], [2.0, 1.25, 1.125]) == 0.25
    assert bench.loss_difference([2.0, math.nan], [2.0, 1.0]) == math.inf


def falling(by: float, last: float = 0.0) -> list[float]:
    return [3.0 - by * update for update in range(40)] + [last] * 10


def test_exact_curves_agree_at_every_update() -> None:
    peft = falling(0.01, 2.0)
    assert bench.judge_curves({0: [loss + 5e-4 for loss in peft]}, {0: peft}, exact=True)["wrong"] == []
    once = [*peft[:20], peft[20] + 2e-3, *peft[21:]]
    assert bench.judge_curves({0: once}, {0: peft}, exact=True)["wrong"] == ["over 50 updates the losses differ by 2.0e-03, and 1.0e-03 is allowed"]
    assert len(bench.judge_curves({0: [*peft[:-1], math.nan]}, {0: peft}, exact=True)["wrong"]) == 1


def test_noisy_curves_agree_within_the_noise_of_peft() -> None:
    peft = {seed: falling(0.01, last) for seed, last in enumerate((2.0, 2.25, 2.125))}  # from seed to seed: 0.25
    ours = {0: falling(0.01, 2.5), 1: falling(0.01, 2.25), 2: falling(0.01, 2.125)}
    found = bench.judge_curves(ours, peft, exact=False)  # means of 2.125 and 2.2917
    assert found["difference"] == pytest.approx(0.5 / 3)
    assert found["allowed"] == 0.25
    assert found["wrong"] == []
    assert bench.judge_curves({0: ours[0]}, peft, exact=False)["difference"] == 0.5  # against the same seed
    assert len(bench.judge_curves({0: ours[0]}, peft, exact=False)["wrong"]) == 1
    same = dict.fromkeys(range(3), peft[0])
    assert bench.judge_curves({0: peft[0]}, same, exact=False)["wrong"] == []


def test_seeds_of_the_loss_curves() -> None:
    ours, peft = "ours", "peft"
    assert bench.curve_runs("smollm2-text", "float32", 3) == [(ours, 0), (peft, 0)]
    assert bench.curve_runs("smollm2-text", "bfloat16", 2) == [(ours, 0), (peft, 0), (peft, 1)]
    assert bench.curve_runs("minilm", "float32", 2) == [(ours, 0), (ours, 1), (peft, 0), (peft, 1)]


def test_a_loss_that_does_not_fall_says_nothing() -> None:
    flat = [2.0] * 50
    assert "does not fall" in bench.judge_curves({0: flat}, {0: flat}, exact=True)["wrong"][0]


def found_by_processes(wrong: list[str], losses: list[float]) -> Any:
    """What the processes of a run answer, without running any."""

    def answer(script: str, task: str, **arguments: Any) -> Any:
        if task == "check":
            both = {"ours": 1, "peft": 1}
            return {
                "parameters": both, "dtypes": {side: ["float32"] for side in both}, "output_difference": both, "losses": both,
                "loss_difference": 0.0, "wrong": wrong, "labelled": 4, "products": [],
            }  # fmt: skip
        if task == "curve":
            return losses if arguments["side"] == "ours" else falling(0.01, 2.0)
        if task == "floor":
            return {"side": "floor", "seconds": 1.0}
        return {"side": arguments["side"], "seconds": [1.0 if arguments["side"] == "ours" else 2.0], "tokens": 4, "memory": 4 * MIB}

    return answer


def report(monkeypatch: pytest.MonkeyPatch, wrong: list[str], losses: list[float]) -> dict[str, Any]:
    monkeypatch.setattr(bench, "in_process", found_by_processes(wrong, losses))
    options = {
        "cases": ["smollm2-text"],
        "dtypes": ["float32"],
        "pairs": 2,
        "steps": 1,
        "updates": 50,
        "seeds": 3,
        "no_verify": True,
        "output": Path(),
    }
    return bench.run(argparse.Namespace(**options))


def test_a_run_measures_and_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(monkeypatch, [], falling(0.01, 2.0))
    assert [block["side"] for block in found["cases"][0]["blocks"]] == ["ours", "peft", "floor", "peft", "ours", "floor"]
    page = bench.markdown(found)
    assert "0.50 (0.50 to 0.50), goal 0.55: met" in page
    assert "1.00 (1.00 to 1.00), goal 0.5: **missed**" in page
    assert "--cases smollm2-text --dtypes float32 --pairs 2 --steps 1 --updates 50 --seeds 3 --no-verify`" in page


@pytest.mark.parametrize(("wrong", "losses"), [(["too few parameters"], falling(0.01, 2.0)), ([], falling(0.01, 1.5))])
def test_unequal_work_and_unequal_learning_are_not_measured(wrong: list[str], losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    found = report(monkeypatch, wrong, losses)
    assert found["cases"][0]["blocks"] == []
    page = bench.markdown(found)
    assert "**smollm2-text float32 is not reported**" in page
    assert "goal" not in page


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it
def test_both_sides_start_from_the_same_factors() -> None:
    ours, peft = (common.attach(side, llama(), steps=1, rank=2, task_type="CAUSAL_LM")[0] for side in common.SIDES)
    for network in (ours, peft):
        common.start_from(network, 3, std=0.1)
    first, second = common.factors(ours), common.factors(peft)
    assert sorted(first) == sorted(second)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
