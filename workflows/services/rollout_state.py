"""The state of one rollout, and the decisions about it that need no I/O. Pure."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from heliostat.models.common import Result


class RolloutKind(StrEnum):
    STEPS = "steps"
    """New clusters, weights by steps."""
    IN_PLACE = "in_place"
    """The same clusters, one after the other."""
    WEIGHTS = "weights"
    """Static weights of several versions."""


class RolloutData(Result):
    kind: RolloutKind
    deploy_id: str
    actor: str
    version_ids: list[str]
    """The versions that must be fit before any traffic moves; ``STEPS`` and ``IN_PLACE`` have one."""
    base: dict[str, int] = {}
    """Weights before: those that a rollback returns to."""
    target: dict[str, int] = {}
    """``WEIGHTS`` only."""
    steps: list[int] = []
    percent: int = 0
    stop_at: int | None = None
    """Pause at this share."""
    surge: int = 100
    back: bool = False
    """It returns to an earlier version: no steps, no canary."""
    paused: bool = False
    held: bool = False
    """The current step was held to its end."""
    skip: bool = False
    """A user has promoted it: the current step's hold is over."""
    since: datetime
    health_deadline: datetime
    deadline: datetime
    holds_until: datetime | None = None
    paused_at: datetime | None = None
    observed: str = ""
    doing: str = "starting"
    """``starting``, ``shifting``, ``holding``, ``paused``, ``completing``, ``going back``."""
    end: str = ""
    """Why it is to be rolled back; "" while it is not."""
    failed: bool = False
    """It is rolled back because the new version is at fault, which is then retained for inspection."""

    @property
    def version_id(self) -> str:
        return self.version_ids[0]

    @property
    def canaried(self) -> bool:
        """The new version has a share that is measured against the versions before."""
        return self.kind == RolloutKind.STEPS and bool(self.base) and not self.back and 0 < self.percent < 100

    @property
    def watched_in_background(self) -> bool:
        """The canary has traffic while no step is held: the rollout is paused, or capacity moves."""
        moving = self.doing == "shifting" and self.surge < 100 and not self.end
        return self.canaried and (self.paused or moving)

    def resume(self, now: datetime) -> None:
        """Its own deadlines stand still while it is paused."""
        if self.paused and self.paused_at is not None:
            self.deadline += now - self.paused_at
            self.health_deadline += now - self.paused_at
        self.paused, self.paused_at = False, None

    def next_step(self) -> int | None:
        """The next share to shift to; None: it is at its end or where it is to stop."""
        last = 100 if self.stop_at is None else min(self.stop_at, 100)
        if self.percent >= last:
            return None
        return next((min(step, last) for step in self.steps if step > self.percent), last)

    def weights(self) -> dict[str, int]:
        """At ``percent``: the new version's share, and the others' in proportion."""
        rest = shares(self.base, 100 - self.percent)
        return {v: w for v, w in {**rest, self.version_id: self.percent}.items() if w or v == self.version_id}


def shares(parts: dict[str, int], total: int) -> dict[str, int]:
    """``total`` divided in proportion to ``parts``, in whole numbers that sum to it (largest remainders)."""
    whole = sum(parts.values())
    if not whole:
        return dict.fromkeys(parts, 0)
    exact = {k: total * v / whole for k, v in parts.items()}
    found = {k: int(v) for k, v in exact.items()}
    left = total - sum(found.values())
    for k in sorted(exact, key=lambda k: (found[k] - exact[k], k))[:left]:
        found[k] += 1
    return found
