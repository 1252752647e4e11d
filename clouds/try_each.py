"""Deletes many things of which each may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from heliostat.errors import CloudError

T = TypeVar("T")


def try_each(things: Iterable[T], do: Callable[[T], object], passes: Callable[[CloudError], bool]) -> list[T]:
    """Does it to each thing; returns those for which it was done. One that fails does not stop the others: the first
    failure is raised after all were tried.

    Args:
        passes: whether an error is no failure, e.g. because somebody else has deleted the thing.
    """
    done: list[T] = []
    failed: CloudError | None = None
    for thing in things:
        try:
            do(thing)
            done.append(thing)
        except CloudError as e:
            if not passes(e):
                failed = failed or e
    if failed is not None:
        raise failed
    return done
