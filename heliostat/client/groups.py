"""Groups of calls of one kind of resource, for both clients.

:class:`one` and :class:`many` turn a flow into a method. ``Group[Sync].method`` then returns the result (or an
iterator), ``Group[Async].method`` an awaitable (or an async iterator); a type checker sees the same.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, Generic, TypeVar, overload

from heliostat.client.effects import Async, Flow, P, Stream, Sync, T
from heliostat.client.transport import Api

M = TypeVar("M", bound=Sync | Async)


class Group(Generic[M]):
    """The methods of one noun; ``M`` says how they are carried out."""

    def __init__(self, driver: M, api: Api) -> None:
        self._driver = driver
        self._api = api


class one(Generic[P, T]):
    """A method with one result."""

    def __init__(self, flow: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self.flow = flow
        self.__doc__ = flow.__doc__

    @overload
    def __get__(self, group: None, owner: type) -> one[P, T]: ...
    @overload
    def __get__(self, group: Group[Sync], owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, group: Group[Async], owner: type) -> Callable[P, Awaitable[T]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        if group is None:
            return self

        @functools.wraps(self.flow)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return group._driver.run(self.flow(group, *args, **kwargs))

        return method


class many(Generic[P, T]):
    """A method that yields items as they come."""

    def __init__(self, stream: Callable[Concatenate[Any, P], Stream[T]]) -> None:
        self.stream = stream
        self.__doc__ = stream.__doc__

    @overload
    def __get__(self, group: None, owner: type) -> many[P, T]: ...
    @overload
    def __get__(self, group: Group[Sync], owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, group: Group[Async], owner: type) -> Callable[P, AsyncIterator[T]]: ...

    def __get__(self, group: Any, owner: type) -> Any:
        if group is None:
            return self

        @functools.wraps(self.stream)
        def method(*args: P.args, **kwargs: P.kwargs) -> Any:
            return group._driver.iterate(self.stream(group, *args, **kwargs))

        return method
