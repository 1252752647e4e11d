"""Messages are delivered at least once: the ids of those that were handled. Pure."""

from __future__ import annotations

SEEN_MAX = 500
"""An agent repeats a fact until it is acknowledged, seconds later; 500 facts are hours of one entity's changes."""


def first_sight(seen: list[str], event_id: str) -> bool:
    """Whether this message is new; remembers it in ``seen``, which is part of the workflow's state."""
    if event_id in seen:
        return False
    seen.append(event_id)
    del seen[:-SEEN_MAX]
    return True
