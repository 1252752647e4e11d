"""Reports to the control plane: every ``interval_s``, and at once when there is a new event."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.channel import Backoff, Gone, Refused, Unavailable
from agent.constants import PROTOCOL
from agent.context import Context
from agent.events import now

log = logging.getLogger("agent.node.reporter")


class Reporter:
    def __init__(
        self, context: Context, interval_s: float, snapshot: Callable[[], dict[str, Any]],
        on_answer: Callable[[dict[str, Any]], None], on_unauthenticated: Callable[[], None],
    ) -> None:  # fmt: skip
        """``snapshot``: a report's content beside events. ``on_answer``: called after the acknowledgements."""
        self._context = context
        self._events = context.events
        self._constants = context.boot.constants
        self._interval_s = interval_s
        self._snapshot = snapshot
        self._on_answer = on_answer
        self._on_unauthenticated = on_unauthenticated
        self._wake = threading.Event()
        self._seq = 0
        self._sending = threading.Lock()
        self._events.on_new = self._wake.set

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``."""
        backoff = Backoff(self._constants.backoff_base_s, self._constants.backoff_cap_s)
        while not stop.is_set():
            try:
                self.report()
            except (Unavailable, Refused) as error:
                wait = backoff.next()
                log.warning("report failed, next attempt in %.1f s: %s", wait, error)
                if isinstance(error, Refused) and error.status == 401:
                    self._on_unauthenticated()
                stop.wait(wait)  # a new event does not shorten the back-off
                continue
            except Gone as error:
                self._context.fail(error)
                return
            backoff.reset()
            if self._wake.wait(self._interval_s):
                time.sleep(self._constants.batch_s)
                self._wake.clear()

    def report(self, timeout_s: float = 10.0) -> None:
        """One report. Raises Unavailable, Refused, Gone."""
        with self._sending:
            self._wake.clear()
            self._seq += 1
            sent = self._events.pending()
            body = {"protocol": PROTOCOL, "seq": self._seq, "sent_at": now(), "boot_id": self._context.boot_id,
                    "facts": sent, **self._snapshot()}  # fmt: skip
            answer = self._context.channel.call("POST", "/report", body, timeout_s)
            self._interval_s = float(answer.get("interval_s") or self._interval_s)
            self._events.acknowledge([str(i) for i in answer.get("acked") or []])
            self._on_answer(answer)
            sent_ids = {event["id"] for event in sent}
            if any(event["id"] not in sent_ids for event in self._events.pending()):
                # Newer ones, or those beyond PER_REPORT. What was sent but not acknowledged waits for the interval.
                self._wake.set()
