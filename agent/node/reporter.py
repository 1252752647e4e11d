"""Reports: every ``interval_s``, and at once when there is a fact to tell."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.channel import Away, Backoff, Channel, Gone, Refused
from agent.constants import PROTOCOL, Constants
from agent.facts import Facts, now

log = logging.getLogger("agent.node.reporter")


class Reporter:
    def __init__(
        self, channel: Channel, facts: Facts, constants: Constants, boot_id: str, interval_s: float,
        snapshot: Callable[[], dict[str, Any]], on_answer: Callable[[dict[str, Any]], None],
        on_unauthenticated: Callable[[], None], on_gone: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        """``snapshot``: what a report says beside facts. ``on_answer``: after the acknowledgements were taken in."""
        self._channel = channel
        self._facts = facts
        self._constants = constants
        self._boot_id = boot_id
        self._interval_s = interval_s
        self._snapshot = snapshot
        self._on_answer = on_answer
        self._on_unauthenticated = on_unauthenticated
        self._on_gone = on_gone
        self._wake = threading.Event()
        self._seq = 0
        self._sending = threading.Lock()
        facts.wake = self._wake.set

    def poke(self) -> None:
        """Report at once."""
        self._wake.set()

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``."""
        backoff = Backoff(self._constants.backoff_base_s, self._constants.backoff_cap_s)
        while not stop.is_set():
            try:
                self.report()
            except (Away, Refused) as error:
                wait = backoff.next()
                log.warning("report not heard, again in %.1f s: %s", wait, error)
                if isinstance(error, Refused) and error.status == 401:
                    self._on_unauthenticated()
                stop.wait(wait)  # a fact does not hurry an API that is away
                continue
            except Gone as error:
                self._on_gone(error)
                return
            backoff.reset()
            if self._wake.wait(self._interval_s):
                time.sleep(self._constants.batch_s)
                self._wake.clear()

    def report(self, timeout_s: float = 10.0) -> None:
        """One report. Raises Away, Refused, Gone."""
        with self._sending:
            self._wake.clear()
            self._seq += 1
            told = self._facts.pending()
            body = {"protocol": PROTOCOL, "seq": self._seq, "sent_at": now(), "boot_id": self._boot_id,
                    "facts": told, **self._snapshot()}  # fmt: skip
            answer = self._channel.call("POST", "/report", body, timeout_s)
            self._interval_s = float(answer.get("interval_s") or self._interval_s)
            self._facts.ack([str(i) for i in answer.get("acked") or []])
            self._on_answer(answer)
            heard = {f["id"] for f in told}
            if any(f["id"] not in heard for f in self._facts.pending()):
                self._wake.set()  # more came meanwhile, or did not fit; what was not acknowledged waits its turn
