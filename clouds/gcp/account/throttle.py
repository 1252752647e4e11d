"""Back-off that all callers of one project share.

Compute Engine counts requests per project, region and minute, in groups of methods (most have 1500;
https://cloud.google.com/compute/api-quota), and what it refuses counts too. So when it says "too many", nobody of this
process asks for a while: the pause doubles with each refusal, is jittered so that two processes part, and ends with the
first call that is taken.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from clouds.contract.errors import Throttled

FIRST_S, MOST_S = 1.0, 60.0
PATIENCE_S = 15.0
"""A caller that would wait for longer fails at once: the activity's own retry waits better than a thread does."""


class Backoff:
    """One project's; safe from several threads.

    Args:
        clock, sleep: seconds, monotonic. Tests give their own.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._pause = self._not_before = self._refused_at = 0.0

    def wait(self, doing: str) -> float:
        """Returns when a call may be made; gives that moment, for ``refused``. Raises Throttled if that is far off."""
        asked = self._clock()
        with self._lock:
            left = self._not_before - asked
        if left > PATIENCE_S:
            raise Throttled(
                f"Google Cloud throttles this project for {left:.0f} s; not done: {doing}.",
                remedy="Try again later; raise the project's quota of API requests if this is common.",
            )
        if left > 0:
            self._sleep(left)
        return self._clock()

    def refused(self, asked_at: float) -> None:
        """A call that was made at ``asked_at`` was one too many. Those of one burst count once."""
        with self._lock:
            if asked_at <= self._refused_at:
                return
            now = self._clock()
            self._pause = min(max(self._pause * 2, FIRST_S), MOST_S)
            self._refused_at = now
            self._not_before = now + self._pause * random.uniform(0.5, 1.0)

    def taken(self, asked_at: float) -> None:
        """A call that was made at ``asked_at`` was not refused."""
        with self._lock:
            if asked_at > self._refused_at:
                self._pause = 0.0
