"""How far a long piece of work is: whoever does it says so, and whoever wants to show it watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Watch = Callable[[str, int, int], None]  # (what is done, how many of it, of how many)
_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """While it lasts, ``watch`` hears of every piece of work in this thread."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


def followed(items: Sequence[T], what: str) -> Iterator[T]:
    """``items`` one by one; who watches hears before each, and after the last, how many are done."""
    for done, item in enumerate(items):
        _tell(what, done, len(items))
        yield item
    _tell(what, len(items), len(items))


def _tell(what: str, done: int, total: int) -> None:
    watch = _watch.get()
    if watch is not None:
        watch(what, done, total)
