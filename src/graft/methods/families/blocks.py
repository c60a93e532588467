"""Sizes of blocks that have to divide a dimension."""

from __future__ import annotations

from graft.core.errors import GraftError


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of ``number`` that is not above ``at_most``."""
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)


def nearest_divisor(number: int, wanted: int, multiple: int = 1) -> int | None:
    """The divisor d > 1 of ``number`` nearest to ``wanted``, the smaller of two, with ``multiple * d`` dividing too; None where there is none."""
    fitting = [size for size in range(2, number + 1) if number % (multiple * size) == 0]
    return min(fitting, key=lambda size: (abs(size - wanted), size), default=None)


def rotated(number: int, wanted: int, name: str) -> int:
    """:func:`nearest_divisor`, of the inputs of the target ``name``; raises :class:`GraftError` where there is nothing to rotate."""
    size = nearest_divisor(number, wanted)
    if size is None:
        raise GraftError(f"{name} has one input, and a rotation needs two; narrow the targets.")
    return size
