"""The counters of Serve's proxy on this head. Its gate answers them at ``/-/heliostat`` to the probe token, which only
this agent has."""

from __future__ import annotations

import http.client
import json
import logging
import threading
from collections.abc import Callable
from typing import Any

from agent.channel import Http
from agent.constants import Constants

log = logging.getLogger("agent.serve.proxy")
STATISTICS_PATH = "/-/heliostat"


class ProxyUnavailable(Exception):
    """The proxy did not answer, or not with its counters. ``not_listening``: no process listens at its port, so no
    request can be under way there."""

    def __init__(self, message: str, not_listening: bool = False) -> None:
        self.not_listening = not_listening
        super().__init__(message)


class Proxy:
    """Callable from any thread."""

    def __init__(self, address: str, token: str) -> None:
        self._http = Http(f"http://{address}")
        self._headers = {"Authorization": f"Bearer {token}"}

    def statistics(self, timeout_s: float) -> dict[str, Any]:
        """``ServeTraffic`` and ``revision``. Raises ProxyUnavailable."""
        try:
            status, raw = self._http.request("GET", STATISTICS_PATH, None, self._headers, timeout_s)
        except ConnectionRefusedError:
            raise ProxyUnavailable("no process listens at the proxy's port", not_listening=True) from None
        except (OSError, http.client.HTTPException) as error:
            raise ProxyUnavailable(f"the proxy does not answer: {error!r}") from None
        if status != 200:
            raise ProxyUnavailable(f"the proxy answers HTTP {status}")
        try:
            answer = json.loads(raw)
            int(answer["revision"])
        except (ValueError, TypeError, KeyError):
            raise ProxyUnavailable("the proxy's answer does not come from its gate") from None
        return dict(answer)


class Traffic:
    """The proxy's counters for the reports. A thread of its own polls them, so that no report waits for them."""

    def __init__(self, proxy: Proxy, constants: Constants, deployed: Callable[[], bool]) -> None:
        self._proxy, self._constants, self._deployed = proxy, constants, deployed
        self.last: dict[str, Any] | None = None
        """ServeTraffic; None until something is deployed."""

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``."""
        while not stop.wait(self._constants.serve_traffic_s):
            if self._deployed():
                self.poll()

    def poll(self) -> None:
        try:
            statistics = self._proxy.statistics(self._constants.serve_traffic_s)
        except ProxyUnavailable as error:
            log.debug("%s", error)
            self.last = (self.last or {}) | {"alive": False}
        else:
            del statistics["revision"]
            self.last = statistics | {"alive": True}
