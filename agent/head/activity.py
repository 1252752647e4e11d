"""Is this cluster busy? Observed on the head, damped, reported only when it changes.

Busy: a run, a package download, a connected driver, any Ray job that has not ended, a Serve application (Ray reports a
serving cluster as INACTIVE, so its ``component_activities`` is not enough).
A detached actor that outlived its driver does not count: Ray Data, Train and Serve leave such actors behind after their
last job or application, and they look like a user's. Keep a driver or a lease for one.
Unknown: Ray does not answer; the control plane counts it as busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from agent.constants import Constants
from agent.events import Events, now
from agent.ray_node.api import RayApi, RayUnavailable

log = logging.getLogger("agent.head.activity")
BUSY, IDLE, UNKNOWN = "busy", "idle", "unknown"


def observe(ray: RayApi, own: Callable[[], str]) -> tuple[str, str]:
    """The current activity and its reason. ``own``: the agent's own work under way, "" if none. While there is some,
    Ray is not asked."""
    reason = own()
    if reason:
        return BUSY, reason
    try:
        driver = ray.driver_reason()
        if driver:
            return BUSY, driver
        actors = ray.actors()
        if any(a.get("ray_namespace") == "serve" for a in actors):
            applications = ray.serve_applications()
            if applications:
                return BUSY, f"Serve applications: {', '.join(applications)[:200]}"
        for actor in actors:
            if actor.get("class_name") == "JobSupervisor":
                return BUSY, f"Ray job {str(actor.get('name')).removeprefix('_ray_internal_job_actor_')}"
    except RayUnavailable as error:
        return UNKNOWN, f"Ray does not answer: {error}"
    return IDLE, "no driver, job or Serve application"


class Activity:
    def __init__(self, ray: RayApi, events: Events, constants: Constants, own: Callable[[], str]) -> None:
        self._ray = ray
        self._events = events
        self._constants = constants
        self._own = own
        self._lock = threading.Lock()
        self._seen = (UNKNOWN, 0, now())
        """The last observation, how often in a row, and since when."""
        self.state, self.reason, self.since = UNKNOWN, "Ray is starting", now()

    def run(self, stop: threading.Event, wake: threading.Event) -> None:
        """Until ``stop``; refreshes at once when ``wake`` is set (a run has started)."""
        while not stop.is_set():
            self.refresh()
            wake.wait(self._constants.activity_s)
            wake.clear()

    def refresh(self) -> tuple[str, str]:
        """Asks Ray. The result is undamped, the reported state is damped."""
        state, reason = observe(self._ray, self._own)
        with self._lock:
            last, times, since = self._seen
            self._seen = (state, times + 1, since) if state == last else (state, 1, now())
            if state == BUSY or self._seen[1] >= self._constants.idle_observations:
                self._change(state, reason, self._seen[2])
        return state, reason

    def _change(self, state: str, reason: str, since: str) -> None:
        self.reason = reason
        if state != self.state:
            self.state, self.since = state, since
            self._events.add("activity", activity=state, since=since, reason=reason[:300])

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return {"activity": self.state, "activity_since": self.since, "activity_reason": self.reason[:300]}
