"""In which order to multiply a frozen W with a low-rank branch: algebraically equal orders, chosen by what they cost.

For x [n, in], W [out, in], A [r, in], B [out, r] and the gradient g [n, out] of the output:

===========  ==========================================  =======================================================
what         thin                                        other order
===========  ==========================================  =======================================================
output       ``x W^T + (x A^T) B^T``                     merged: ``x (W + B A)^T``
d input      ``g W + (g B) A``                           merged: ``g (W + B A)``
d A, d B     ``(g B)^T x``, ``g^T (x A^T)``              full: ``G = g^T x``, then ``B^T G`` and ``G A^T``
===========  ==========================================  =======================================================

The thin orders win unless the rank or the number of rows is large. In a forward pass merging pays from ``n > in out / (in + out)``
on, if all products ran at one rate; in training with thin factor gradients, which need ``x A^T`` and ``g B`` anyway, from ``n > in``
on (output) and ``n > out`` (d input). They do not run at one rate: a product with a short side runs far below the peak, so
:class:`Rates`, measured once on a machine, weighs the floating-point operations. Without a measurement all rates are equal, and the
choice is by operations alone.
Merging rounds ``W + B A`` to the dtype that computes, which swallows small updates in bf16: there, only thin orders are allowed.

Source: RunLoRA (arXiv 2312.03415); lower bounds for the gradients in arXiv 2406.03136.
"""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import NamedTuple

import torch

SIDES = (8, 32, 128, 512)  # shortest sides of a product at which rates are measured
EXACT = (torch.float32, torch.float64)  # dtypes in which merging loses nothing that training needs

Product = tuple[int, int, int]  # a product of [m, k] and [k, n] as (m, n, k)


class Shape(NamedTuple):
    """One adapted map on one batch."""

    rows: int
    inputs: int
    outputs: int
    rank: int


class Plan(NamedTuple):
    """The chosen orders; the defaults are those that never need a second weight."""

    merged_output: bool = False
    merged_input_gradient: bool = False
    full_gradient: bool = False

    @property
    def orders(self) -> dict[str, str]:
        """The order of each product, in words."""
        return {
            "output": "merged" if self.merged_output else "thin",
            "input gradient": "merged" if self.merged_input_gradient else "thin",
            "factor gradients": "full" if self.full_gradient else "thin",
        }

    def __str__(self) -> str:
        return ", ".join(f"{product} {chosen}" for product, chosen in self.orders.items())


PLANS = tuple(Plan(o, i, g) for o in (False, True) for i in (False, True) for g in (False, True))
THIN = PLANS[0]


def products(plan: Plan, shape: Shape) -> list[Product]:
    """The matrix products of one forward and backward pass (both factors and the input need gradients)."""
    n, i, o, r = shape
    merge, down, up = (o, i, r), (n, r, i), (n, o, r)  # B A, x A^T, (x A^T) B^T
    total = [(n, o, i), *([merge] if plan.merged_output else [down, up])]
    # The merged weight is formed again in the backward pass: keeping it would hold a second copy of the model.
    total += [(n, i, o), merge if plan.merged_input_gradient else (n, i, r)]
    if not (plan.merged_input_gradient and plan.full_gradient):
        total.append((n, r, o))  # g B
    if plan.full_gradient:
        return [*total, (o, i, n), (r, i, o), (o, r, i)]
    return [*total, *([down] if plan.merged_output else []), (r, i, n), (r, o, n)]


def operations(plan: Plan, shape: Shape) -> int:
    """Floating-point operations of :func:`products`; a multiplication and an addition are two."""
    return sum(2 * m * n * k for m, n, k in products(plan, shape))


class Rates(NamedTuple):
    """Operations a second of products whose shortest side is that of :data:`SIDES`, in the same order."""

    values: tuple[float, ...]

    def seconds(self, product: Product) -> float:
        """What a product takes; between the measured sides the rate is interpolated on logarithms."""
        m, n, k = product
        side = min(max(min(product), SIDES[0]), SIDES[-1])
        above = next(index for index, value in enumerate(SIDES) if side <= value)
        rate = self.values[above]
        if above:
            share = math.log(side / SIDES[above - 1]) / math.log(SIDES[above] / SIDES[above - 1])
            rate = math.exp((1 - share) * math.log(self.values[above - 1]) + share * math.log(rate))
        return 2 * m * n * k / rate


EQUAL = Rates((1.0,) * len(SIDES))


_rates: dict[tuple[torch.dtype, str], Rates] = {}  # measured on this machine, by dtype and device type


def use_rates(rates: Rates | None, dtype: torch.dtype, device: str = "cpu") -> None:
    """Chooses by these rates from now on; by operations alone where they are None."""
    _rates.pop((dtype, device), None)
    if rates is not None:
        _rates[dtype, device] = rates
    choose.cache_clear()


@lru_cache(maxsize=4096)
def choose(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> Plan:
    """The cheapest plan for ``shape`` at the machine's rates; the thin one where merging would round."""
    if dtype not in EXACT or 0 in shape:
        return THIN
    rates = _rates.get((dtype, device), EQUAL)
    return min(PLANS, key=lambda plan: sum(rates.seconds(product) for product in products(plan, shape)))


def measure(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> Rates:
    """Times products of 512 x 1024 with each of :data:`SIDES`; well under a second."""
    return Rates(tuple(_rate(side, dtype, device, repeats) for side in SIDES))


def _rate(side: int, dtype: torch.dtype, device: str, repeats: int) -> float:
    a, b = torch.ones(512, 1024, dtype=dtype, device=device), torch.ones(1024, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * 512 * 1024 * side / sorted(seconds[1:])[repeats // 2]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()
