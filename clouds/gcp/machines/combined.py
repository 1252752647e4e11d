"""Batches the queries of several threads: 200 launches at once cost one list, not 200."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class _Batch(Generic[Answer]):
    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.answers: Future[dict[str, Answer]] = Future()


class Combined(Generic[Answer]):
    """While one question is under way, those that come meanwhile wait and go together as the next. Nobody is given an
    answer to a question that was asked before theirs.

    Args:
        ask: the answers by key; keys without one are left out. Must have a time limit of its own.
        most: keys in one question; more are asked one after the other.
    """

    def __init__(self, ask: Callable[[list[str]], dict[str, Answer]], most: int) -> None:
        self._ask, self._most = ask, most
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._next: _Batch[Answer] | None = None

    def get(self, keys: Iterable[str]) -> dict[str, Answer]:
        """Raises what ``ask`` raises, to all whose keys were in that question."""
        wanted = set(keys)
        if not wanted:
            return {}
        with self._lock:
            leads = self._next is None
            batch = self._next = self._next or _Batch()
            batch.keys |= wanted
        if leads:
            self._lead(batch)
        found = batch.answers.result()
        return {key: found[key] for key in wanted if key in found}

    def _lead(self, batch: _Batch[Answer]) -> None:
        try:
            with self._turn:
                with self._lock:
                    self._next = None  # whoever comes from now on is of the next one
                keys = sorted(batch.keys)
                found: dict[str, Answer] = {}
                for start in range(0, len(keys), self._most):
                    found |= self._ask(keys[start : start + self._most])
        except BaseException as e:
            batch.answers.set_exception(e)
            raise
        batch.answers.set_result(found)
