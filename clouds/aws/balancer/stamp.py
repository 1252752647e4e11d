"""Which change of its backends an ALB has been given, and which one is done; written on the ALB itself."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

from clouds.contract.balancer import Backend

WANTED_TAG, APPLIED_TAG = "heliostat-wanted", "heliostat-applied"
"""On the ALB: ``<revision>:<hash of the backends>:<Unix time>``, before and after a change. The backends themselves are
in the tags of their groups."""
CHANGE_S = 120
"""A change that was begun longer ago, and is not finished, was cut short: one takes 30 s at most."""


@dataclass(frozen=True)
class Stamp:
    revision: int
    digest: str
    at: int = field(compare=False)

    @classmethod
    def of(cls, revision: int, backends: list[Backend], at: float) -> Stamp:
        text = "\n".join(b.model_dump_json() for b in backends)
        return cls(revision, hashlib.sha256(text.encode()).hexdigest()[:32], int(at))

    @classmethod
    def read(cls, text: str | None) -> Stamp | None:
        match = re.fullmatch(r"(-?\d+):([0-9a-f]{32}):(\d+)", text or "")
        return cls(int(match[1]), match[2], int(match[3])) if match else None

    def __str__(self) -> str:
        return f"{self.revision}:{self.digest}:{self.at}"


def is_changing(tags: dict[str, str], now: float) -> bool:
    """Whether another process seems to apply a change; if so, this one does not."""
    wanted = Stamp.read(tags.get(WANTED_TAG))
    return wanted is not None and Stamp.read(tags.get(APPLIED_TAG)) != wanted and now - wanted.at < CHANGE_S
