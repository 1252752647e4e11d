"""What every resource shares: the base model, ids, names, the page of a list."""

from __future__ import annotations

import difflib
import hashlib
import re
import secrets
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"
"""Names appear in URLs, tags and file names; the alphabet is Anyscale's."""

Name = Annotated[str, Field(pattern=NAME_PATTERN)]

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford: no i l o u


class Model(BaseModel):
    """Strict base: an unknown field is an error that names it, never ignored."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Result(BaseModel):
    """Base of the server's answers. A newer server may add fields, so the client ignores unknown ones."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)


def new_id(prefix: str) -> str:
    """``prefix_`` + 10 characters of milliseconds + 10 random ones: sorts by creation, so cursors are ids."""
    millis = int(time.time() * 1000)
    stamp = "".join(_ALPHABET[(millis >> shift) & 31] for shift in range(45, -5, -5))
    return f"{prefix}_{stamp}{''.join(secrets.choice(_ALPHABET) for _ in range(10))}"


def derived_id(prefix: str, *parts: object) -> str:
    """An id in the form of ``new_id`` that is always the same for the same ``parts``: creating it again
    gives the same resource."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    number = int.from_bytes(digest[:13], "big")
    return f"{prefix}_{''.join(_ALPHABET[(number >> (5 * i)) & 31] for i in range(20))}"


def is_id(text: str, prefix: str) -> bool:
    return re.fullmatch(rf"{prefix}_[{_ALPHABET}]{{20}}", text) is not None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for the unknown field ``name``."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"Did you mean {near[0]!r}?" if near else f"The fields are: {', '.join(known)}."


def utcnow() -> datetime:
    return datetime.now(UTC)


class Condition(Result):
    """One condition of a resource and its time, e.g. ``HeadReady=true since …``, as in Kubernetes."""

    type: str
    status: bool
    reason: str = ""
    message: str = ""
    since: datetime


class EventLevel(StrEnum):
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"


class Event(Result):
    """One event of a resource: who did what, when and why."""

    id: str
    resource_id: str
    at: datetime
    level: EventLevel = EventLevel.INFO
    kind: str
    """Kind of the event, for programs, e.g. ``node_lost``."""
    actor: str
    """Who caused it: ``user:<name>``, ``agent:<node id>``, ``system`` or, in older events, a workflow id."""
    message: str


Item = TypeVar("Item")


class Page(Result, Generic[Item]):
    """One page of a list. ``next_cursor`` is opaque; it is absent on the last page."""

    items: list[Item]
    next_cursor: str | None = None
