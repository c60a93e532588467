"""Sizes of blocks that have to divide a dimension."""

from __future__ import annotations


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of ``number`` that is not above ``at_most``."""
    return next(size for size in range(min(number, at_most), 0, -1) if number % size == 0)


def nearest_divisor(number: int, wanted: int, pieces: int = 1) -> int | None:
    """The size > 1 nearest to ``wanted`` (the smaller of two) of which a multiple of ``pieces`` blocks make up ``number``; None without one.

    Several pieces exchange halves of their blocks, so then the size is even.
    """
    sizes = [size for size in range(2, number + 1) if number % (pieces * size) == 0 and (pieces == 1 or size % 2 == 0)]
    return min(sizes, key=lambda size: (abs(size - wanted), size), default=None)
