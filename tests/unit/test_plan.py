"""The planner of ``kernels/plan.py``: its counts against torch's, its choice against brute force, its rates against their definition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from graft.kernels import plan
from graft.kernels.lora import lora_linear
from graft.kernels.plan import EQUAL, PLANS, SIDES, THIN, Plan, Rates, Shape, choose, operations, products, use_rates

shapes = st.builds(Shape, *(st.integers(1, 400) for _ in range(3)), st.integers(1, 64))


@pytest.fixture(autouse=True)
def _fresh_rates() -> Iterator[None]:
    yield
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        use_rates(None, dtype)


def counted(chosen: Plan, shape: Shape, monkeypatch: Any) -> int:
    """The operations that torch sees in a forward and backward pass."""
    monkeypatch.setattr(plan, "choose", lambda *_: chosen)
    n, i, o, r = shape
    x, A, B = (torch.randn(size, requires_grad=True) for size in ((n, i), (r, i), (o, r)))
    adding = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}  # by shapes; torch counts only those that make a new tensor
    with FlopCounterMode(display=False, custom_mapping=adding) as counter:
        lora_linear(x, torch.randn(o, i), torch.randn(o), A, B).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("chosen", PLANS, ids=str)
@pytest.mark.parametrize("shape", [Shape(7, 11, 13, 3), Shape(40, 9, 5, 2), Shape(1, 6, 8, 6), Shape(5, 5, 5, 1)], ids=str)
def test_operations_are_those_that_torch_counts(chosen: Plan, shape: Shape, monkeypatch: Any) -> None:
    assert operations(chosen, shape) == counted(chosen, shape, monkeypatch)


def test_all_eight_plans_are_there_once() -> None:
    assert len(set(PLANS)) == 8
    assert Plan() == THIN
    assert len({str(each) for each in PLANS}) == 8


@settings(max_examples=100, deadline=None)
@given(shape=shapes)
def test_the_choice_is_the_cheapest_plan(shape: Shape) -> None:
    for dtype in plan.EXACT:
        assert operations(choose(shape, dtype), shape) == min(operations(each, shape) for each in PLANS)


@settings(max_examples=50, deadline=None)
@given(shape=shapes, rates=st.tuples(*(st.floats(0.01, 100) for _ in SIDES)))
def test_the_choice_is_the_fastest_plan_at_the_rates_in_use(shape: Shape, rates: tuple[float, ...]) -> None:
    use_rates(Rates(rates), torch.float32)
    times = {each: sum(Rates(rates).seconds(p) for p in products(each, shape)) for each in PLANS}
    assert times[choose(shape, torch.float32)] == min(times.values())


@pytest.mark.parametrize(("inputs", "outputs"), [(100, 100), (30, 60), (60, 30), (7, 42)])
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("merged", [Plan(True, False, True), Plan(False, True, True)], ids=["output", "input-gradient"])
def test_merging_pays_from_the_crossover_on(inputs: int, outputs: int, rank: int, merged: Plan) -> None:
    """r in out against n r (in + out): equal at n = in out / (in + out), where no thin product is needed for the factors anyway."""
    crossover = inputs * outputs / (inputs + outputs)

    def saved(rows: int) -> int:
        shape = Shape(rows, inputs, outputs, rank)
        return operations(Plan(False, False, True), shape) - operations(merged, shape)

    assert saved(math.ceil(crossover) - 1) < 0 < saved(math.floor(crossover) + 1)
    if crossover == int(crossover):
        assert saved(int(crossover)) == 0


@pytest.mark.parametrize("dtype", plan.EXACT, ids=str)
def test_the_choice_merges_where_it_saves_more_than_the_factors_need_again(dtype: torch.dtype) -> None:
    """At a small rank dA needs g B, and dB needs x A^T, whatever the order: merging the output saves n r out, the gradient of x n r in,
    and each costs r in out."""
    for rows in range(1, 200):
        assert choose(Shape(rows, 50, 80, 2), dtype) == Plan(rows > 50, rows > 80, False)


def test_the_choice_forms_the_full_gradient_at_a_large_rank() -> None:
    """Its n in out is little beside four thin products of n r in or n r out, if r is near in."""
    assert choose(Shape(4000, 100, 100, 80), torch.float32) == Plan(True, True, True)


def test_rates_change_the_choice_and_none_takes_them_back() -> None:
    shape, by_operations, few_short = Shape(1000, 100, 100, 8), Plan(True, True, False), Plan(True, True, True)
    assert choose(shape, torch.float64) == by_operations
    # Products with a short side a thousand times slower: the four of size 8 x 100 x 100 beat any of 8 x 100 x 1000.
    use_rates(Rates((1.0, 1000.0, 1000.0, 1000.0)), torch.float64)
    assert choose(shape, torch.float64) == few_short
    assert choose(shape, torch.float32) == by_operations  # another dtype keeps its own
    assert choose(shape, torch.float64, "cuda") == by_operations
    use_rates(None, torch.float64)
    assert choose(shape, torch.float64) == by_operations


@settings(max_examples=30, deadline=None)
@given(shape=shapes)
def test_low_precision_never_merges(shape: Shape) -> None:
    """W + B A rounded to bf16 would lose small updates, whatever it costs."""
    use_rates(Rates((1e-9, 1.0, 1.0, 1.0)), torch.bfloat16)
    assert choose(shape, torch.bfloat16) == choose(shape, torch.float16) == THIN


@pytest.mark.parametrize("at", range(4))
def test_an_empty_shape_is_thin(at: int) -> None:
    sizes = [5, 5, 5, 5]
    sizes[at] = 0
    assert choose(Shape(*sizes), torch.float32) == THIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_measured_rates_are_positive_and_finite(dtype: torch.dtype) -> None:
    rates = plan.measure(dtype, repeats=1)
    assert len(rates.values) == len(SIDES)
    assert all(0 < value < math.inf for value in rates.values)


RATES = Rates((1.0, 10.0, 5.0, 40.0))


def rate(side: int, rates: Rates = RATES, others: int = 10_000) -> float:
    """Of a product with this shortest side, whichever of the three it is."""
    found = {2 * side * others * others / rates.seconds(p) for p in ((side, others, others), (others, side, others), (others, others, side))}
    assert max(found) == pytest.approx(min(found))
    return found.pop()


def test_rates_at_the_measured_sides_are_the_measured_ones() -> None:
    assert [rate(side) for side in SIDES] == pytest.approx(RATES.values)


def test_rates_between_two_sides_lie_between_their_rates_and_outside_are_the_last() -> None:
    for (low, high), (first, second) in zip(pairwise(SIDES), pairwise(RATES.values), strict=True):
        between = [rate(side) for side in range(low, high + 1)]
        steps = [b - a for a, b in pairwise(between)]
        assert all(step > 0 for step in steps) if second > first else all(step < 0 for step in steps)
        middle = math.isqrt(low * high)  # halfway on logarithms
        assert rate(middle) == pytest.approx(math.sqrt(first * second))
    assert rate(1) == rate(3) == pytest.approx(RATES.values[0])
    assert rate(2000) == pytest.approx(RATES.values[-1])


@settings(max_examples=30, deadline=None)
@given(shape=shapes)
def test_equal_rates_count_operations(shape: Shape) -> None:
    for each in PLANS:
        assert sum(EQUAL.seconds(p) for p in products(each, shape)) == pytest.approx(operations(each, shape))
