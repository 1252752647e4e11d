"""Interruption notices: the cloud reclaims this machine. They come from the metadata service, which only the machine
itself can reach.

AWS (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html): two minutes before a
spot machine is interrupted, and a recommendation when that becomes likely. Google Cloud
(https://cloud.google.com/compute/docs/instances/spot#preemption-process): 30 seconds before a spot machine is
preempted, and maintenance that a machine does not survive.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from agent.channel import Http
from agent.constants import Constants

log = logging.getLogger("agent.node.interruptions")
PREEMPTION_S = 30
TOKEN_S = 21600
"""Requested lifetime of an IMDSv2 token: the maximum."""
WAIT_S = 60
"""Google's server holds a request this long while nothing changes."""


@dataclass(frozen=True)
class Notice:
    kind: str
    """``interruption``: the cloud reclaims the machine at the deadline. ``rebalance``: an interruption has become
    likely. ``maintenance``: the machine ends with its host."""
    deadline: str | None
    """ISO 8601; None: unknown."""
    reason: str

    def left_s(self) -> int | None:
        if self.deadline is None:
            return None
        return max(0, int((datetime.fromisoformat(self.deadline) - datetime.now(UTC)).total_seconds()))


class MetadataError(Exception):
    """An unexpected answer of the metadata service."""


FAILURES = (OSError, http.client.HTTPException, ValueError, KeyError, MetadataError)
"""Of one request; KeyError: a field is missing from its answer. The next request follows all the same."""


class InterruptionWatcher:
    """Args:
    provider: ``aws`` or ``gcp``, as in the boot file.
    on_notice: called once for each kind of notice, from the thread that found it.
    """

    def __init__(self, provider: str, constants: Constants, on_notice: Callable[[Notice], None]) -> None:
        self._constants, self._on_notice = constants, on_notice
        self._http = Http(constants.metadata_url or "http://169.254.169.254")
        self._token, self._token_ends = "", 0.0
        self._etags: dict[str, str] = {}
        self._notices: dict[str, Notice] = {}
        self._lock = threading.Lock()
        sources: dict[str, list[Callable[[float], Notice | None]]] = {
            "aws": [self._aws],
            "gcp": [partial(self._gcp, "preempted"), partial(self._gcp, "maintenance-event")],
        }
        self.sources = sources[provider]
        """Each is polled in a thread of its own (``watch``). The argument: how long it may wait for a change."""

    @property
    def most_serious(self) -> Notice | None:
        """Of the notices so far."""
        with self._lock:
            return next(
                (self._notices[k] for k in ("interruption", "maintenance", "rebalance") if k in self._notices), None
            )

    def watch(self, source: Callable[[float], Notice | None], stop: threading.Event) -> None:
        """Until ``stop``."""
        failing = False
        while not stop.is_set():
            try:
                self._record(source(WAIT_S))
                failing = False
            except FAILURES as error:
                if not failing:
                    log.warning("the machine's metadata is unavailable; retrying: %s", error)
                failing = True
            stop.wait(self._constants.notice_poll_s)

    def poll(self) -> Notice | None:
        """Asks once, without waiting for a change; returns the most serious notice. Raises nothing: this machine goes
        down."""
        for source in self.sources:
            try:
                self._record(source(0))
            except FAILURES as error:
                log.warning("the machine's metadata is unavailable: %s", error)
        return self.most_serious

    def _record(self, notice: Notice | None) -> None:
        if notice is None:
            return
        with self._lock:
            if notice.kind in self._notices:
                return
            self._notices[notice.kind] = notice
        log.warning("%s", notice.reason)
        self._on_notice(notice)

    # -- AWS ------------------------------------------------------------------------------------------------------

    def _aws(self, _wait_s: float) -> Notice | None:
        action = self._imds("spot/instance-action")
        if action is not None:
            at = datetime.fromisoformat(action["time"].replace("Z", "+00:00")).isoformat()
            return Notice("interruption", at, f"AWS interrupts this spot machine ({action['action']}) at {at}")
        advice = self._imds("events/recommendations/rebalance")
        if advice is not None:
            return Notice("rebalance", None, f"AWS may soon interrupt this spot machine (since {advice['noticeTime']})")
        return None

    def _imds(self, path: str) -> dict[str, str] | None:
        """By IMDSv2; None: not found (404)."""
        for _ in range(2):
            if time.monotonic() >= self._token_ends:
                headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
                status, body = self._http.request("PUT", "/latest/api/token", b"", headers, 5)
                if status != 200:
                    raise MetadataError(f"PUT /latest/api/token: HTTP {status}")
                self._token, self._token_ends = body.decode(), time.monotonic() + TOKEN_S / 2
            headers = {"X-aws-ec2-metadata-token": self._token}
            status, body = self._http.request("GET", f"/latest/meta-data/{path}", None, headers, 5)
            if status == 404:
                return None
            if status == 200:
                answer: dict[str, str] = json.loads(body)
                return answer
            self._token_ends = 0.0  # 401: the token is no longer valid
        raise MetadataError(f"GET {path}: HTTP {status}")

    # -- Google Cloud ---------------------------------------------------------------------------------------------

    def _gcp(self, name: str, wait_s: float) -> Notice | None:
        path = f"/computeMetadata/v1/instance/{name}"
        if wait_s and name in self._etags:
            path += f"?wait_for_change=true&timeout_sec={wait_s:.0f}&last_etag={self._etags[name]}"
        status, body, headers = self._http.ask("GET", path, None, {"Metadata-Flavor": "Google"}, wait_s + 5)
        if status != 200:
            raise MetadataError(f"GET {name}: HTTP {status}")
        self._etags[name] = headers.get("ETag") or "0"
        value = body.decode().strip()
        if name == "preempted" and value == "TRUE":
            at = (datetime.now(UTC) + timedelta(seconds=PREEMPTION_S)).isoformat(timespec="seconds")
            return Notice("interruption", at, f"Google Cloud preempts this spot machine at {at}")
        if name == "maintenance-event" and value == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice("maintenance", None, "Google Cloud ends this machine for its host's maintenance")
        return None
