"""Errors a user can act on: one sentence with what was seen, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GraftError(ValueError):
    """A user's mistake. The command line prints it without a traceback and exits with code 2."""


class ToldElsewhere(GraftError):
    """Another process has failed, or in the same way, and its error is the one to show."""


class NotMergeable(GraftError):
    """The adapted map is not a matrix (a router, a non-linearity), so there is nothing to bake."""


def nearest(seen: str, allowed: Iterable[str], most: int = 3) -> str:
    """The names close to ``seen``, as the end of a sentence; all of them when none is close and they are few."""
    names = sorted(set(allowed))
    close = get_close_matches(seen, names, n=most, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(name) for name in close)}?"
    if len(names) <= 24:
        return f"allowed: {', '.join(names)}."
    return f"allowed are {len(names)} names, among them {', '.join(names[:8])}."
