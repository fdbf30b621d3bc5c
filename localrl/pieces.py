"""Work that is done piece by piece, so that somebody may watch it: the memory simulation tells first, middle and last pieces apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Watch = Callable[[str, int, int], bool]
"""(name of the loop, number of the piece, how many there are) -> whether the piece is to be done; the number is the count when the loop is over.
-1, -1: not counted."""
_WATCH: ContextVar[Watch | None] = ContextVar("watch", default=None)


def watched(name: str, items: Sequence[T]) -> Iterator[T]:
    """The items one by one.

    >>> list(watched("letters", "ab"))
    ['a', 'b']
    """
    watch, count = _WATCH.get(), len(items)
    if watch is None:
        yield from items
        return
    for number, item in enumerate(items):
        if watch(name, number, count):
            yield item
    watch(name, count, count)


def slices(name: str, length: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size`, 0: one of all, that cover `length`.

    >>> list(slices("tile", 5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    size = size or max(1, length)
    return watched(name, [slice(start, min(start + size, length)) for start in range(0, length, size)])


def another(name: str) -> None:
    """A piece of a loop that nobody here counts begins."""
    if (watch := _WATCH.get()) is not None:
        watch(name, -1, -1)


@contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """Hear of every loop that is gone through while it is open."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)
