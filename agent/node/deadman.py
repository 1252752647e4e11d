"""The dead-man switch: this machine ends itself when nobody needs it and the control plane is unreachable."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

UNKNOWN_FACTOR = 2
"""While Ray does not answer there may be work: that keeps the machine for this many periods, not for ever."""


class DeadMan:
    """``check`` returns why the machine must end now; "": it need not."""

    def __init__(self, deadman_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._deadman_s = deadman_s
        self._clock = clock
        self._last_work = clock()
        self._last_known = clock()
        self.maximum_uptime_at: str | None = None
        """ISO 8601, from the control plane."""

    def check(self, last_contact: float, activity: str) -> str:
        """``last_contact``: on this object's clock; ``activity``: busy, idle or unknown."""
        at = self._clock()
        if activity == "busy":
            self._last_work = at
        if activity != "unknown":
            self._last_known = at
        if self.maximum_uptime_at:
            end = datetime.fromisoformat(self.maximum_uptime_at)
            if datetime.now(UTC) >= (end if end.tzinfo else end.replace(tzinfo=UTC)):
                return f"maximum uptime reached at {self.maximum_uptime_at}"
        silent = at - last_contact
        if silent < self._deadman_s:
            return ""
        idle = at - self._last_work
        if activity == "idle" and idle >= self._deadman_s:
            return f"no contact with the control plane for {silent:.0f} s and no work for {idle:.0f} s"
        unknown = at - self._last_known
        if activity == "unknown" and unknown >= UNKNOWN_FACTOR * self._deadman_s:
            return f"no contact with the control plane for {silent:.0f} s and Ray did not answer for {unknown:.0f} s"
        return ""
