"""Limits the rate of calls to an account: all callers of this process share one back-off.

AWS throttles per account, region and action, by token buckets (RunInstances: 5 at once, then 2 a second, unless the
account's are larger: https://docs.aws.amazon.com/ec2/latest/devguide/ec2-api-throttling.html). We do not know the
account's numbers, nor who else uses it up, so there is no limit until AWS says so; then all callers of that action are
spread over one line, whose gap doubles with each refusal and shrinks with each success.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from clouds.contract.errors import Throttled

MAX_WAIT_S = 20.0
"""A caller that would wait for longer gets Throttled: its activity is retried."""
FIRST_GAP_S, MAX_GAP_S = 0.25, 8.0
SHRINK = 0.85
"""Of the gap, by each success: from 2/s back to the account's own rate in some 20 calls."""


@dataclass
class _Line:
    gap_s: float = 0.0
    next_at: float = 0.0
    slowed_at: float = 0.0


class RateLimiter:
    """One account and region.

    Args:
        clock, sleep: of this process; tests give their own.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}

    def wait(self, action: str, deadline: float) -> float:
        """Returns when it is this caller's turn; gives the moment, which ``refused`` wants. Raises Throttled at once
        when its turn would come after ``deadline``."""
        with self._lock:
            line = self._lines.setdefault(action, _Line())
            now = self._clock()
            turn = max(now, line.next_at)
            if turn > deadline:
                raise Throttled(
                    f"AWS throttles {action}: calls are {line.gap_s:.2g} s apart, and those queued "
                    f"before this one take {turn - now:.0f} s.",
                    remedy="Try again later; ask AWS for a higher request rate if this is common.",
                )
            line.next_at = turn + line.gap_s
        if turn > now:
            self._sleep(turn - now)
        return turn

    def refused(self, action: str, asked_at: float) -> None:
        """AWS has throttled a call that was made at ``asked_at``. Calls of the same burst count once."""
        with self._lock:
            line, now = self._lines[action], self._clock()
            if asked_at <= line.slowed_at:
                return
            line.gap_s = min(max(line.gap_s * 2, FIRST_GAP_S), MAX_GAP_S)
            line.slowed_at = now
            line.next_at = max(line.next_at, now + line.gap_s)

    def taken(self, action: str) -> None:
        """AWS has answered."""
        with self._lock:
            line = self._lines[action]
            line.gap_s = 0.0 if line.gap_s < FIRST_GAP_S / 8 else line.gap_s * SHRINK

    def deadline(self, wait_s: float = MAX_WAIT_S) -> float:
        return self._clock() + wait_s
