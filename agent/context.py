"""What the parts of a node share: the boot file, the channel to the control plane, the events to report, the logs, and
the node's lifetime."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from agent.boot import Boot
from agent.channel import Channel, Gone
from agent.events import Events
from agent.journal import Journal
from agent.logs import LogShipper

log = logging.getLogger("agent.context")


class Shutdown(Exception):
    """The end of this node's life.

    Args:
        kind: of the event that reports it; "": it is not reported.
        graceful: Ray may end in order.
        report_last: report it only after Ray's end, for the control plane then ends the machine.
    """

    def __init__(self, reason: str, kind: str = "", graceful: bool = True, report_last: bool = False) -> None:
        self.reason, self.kind, self.graceful, self.report_last = reason, kind, graceful, report_last
        super().__init__(reason)


class Context:
    def __init__(self, boot: Boot) -> None:
        self.boot = boot
        self.boot_id = secrets.token_hex(16)
        self.channel = Channel(boot.api_url, boot.ca_file)
        self.events = Events(Journal(boot.node_dir / "facts.journal"), self.boot_id, boot.constants.events_max)
        self.logs = LogShipper(self.channel, boot.constants)
        self.log_file = boot.node_dir / "agent.log"
        """Of the agent, and of Ray's own output."""
        self.ray_up = False
        self.stop = threading.Event()
        """Ends all threads."""
        self.shutdown: Shutdown | None = None
        self._wake = threading.Event()

    def shut_down(self, shutdown: Shutdown) -> None:
        """The first one counts. Callable from any thread."""
        if self.shutdown is None:
            self.shutdown = shutdown
        self._wake.set()

    def shut_down_by_signal(self, reason: str) -> None:
        """From a signal handler. It takes no lock: the main thread, which it interrupts, may hold it. ``sleep`` checks
        often enough."""
        if self.shutdown is None:
            self.shutdown = Shutdown(reason)

    def fail(self, error: Exception) -> None:
        """Shuts the node down after an error that no repetition heals, 410 from the API among them."""
        if isinstance(error, Gone):
            self.shut_down(Shutdown(f"the control plane has ended this node: {error}", graceful=False))
        else:
            log.error("unexpected error", exc_info=error)
            reason = f"the agent failed: {type(error).__name__}; see node/agent.log"
            self.shut_down(Shutdown(reason, "node_failed"))

    def start_thread(self, name: str, target: Callable[..., None], *args: Any) -> None:
        def guarded() -> None:
            try:
                target(*args)
            except Exception as error:  # noqa: BLE001 - a node with a dead thread must not look healthy
                self.fail(error)

        threading.Thread(target=guarded, name=name, daemon=True).start()

    def sleep(self, seconds: float) -> None:
        """Raises Shutdown once this node's life is over."""
        deadline = time.monotonic() + seconds
        while self.shutdown is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._wake.wait(min(left, 0.25))
        raise self.shutdown
