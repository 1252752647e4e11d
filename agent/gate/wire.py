"""ASGI's types, and the header that names the version in every answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any

from .policy import Policy

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

VERSION_HEADER = b"x-heliostat-version"


def with_version(headers: Iterable[Sequence[bytes]], policy: Policy | None) -> list[tuple[bytes, bytes]]:
    """Replaces a header of that name of the application's."""
    kept = [(h[0], h[1]) for h in headers if h[0].lower() != VERSION_HEADER]
    if policy is not None:
        kept.append((VERSION_HEADER, policy.version_id.encode()))
    return kept
