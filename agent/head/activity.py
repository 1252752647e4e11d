"""Is anybody working on this cluster? Asked on the head, damped, told only when it changes.

Busy: a run of ours, a package on its way, a connected driver, any of Ray's own jobs that has not ended, a Serve
application (a serving cluster is INACTIVE in Ray's own eyes, so its ``component_activities`` is not enough).
A detached actor that outlived its driver does not count: Ray Data, Train and Serve leave such actors behind after
their last job or application, and nothing tells those from a user's. Who needs one keeps a driver or a lease.
Unknown: Ray could not be asked; the control plane counts it as busy.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from agent.constants import Constants
from agent.facts import Facts, now
from agent.ray_node.api import RayApi, RayAway

log = logging.getLogger("agent.head.activity")
BUSY, IDLE, UNKNOWN = "busy", "idle", "unknown"


def observe(ray: RayApi, own: Callable[[], str]) -> tuple[str, str]:
    """Activity and its reason, asked now. ``own``: what the agent itself knows to be under way, "" if nothing; then
    Ray is not asked at all."""
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
    except RayAway as error:
        return UNKNOWN, f"Ray can't be asked: {error}"
    return IDLE, "no driver, job or Serve application"


class Activity:
    def __init__(self, ray: RayApi, facts: Facts, constants: Constants, own: Callable[[], str]) -> None:
        self._ray = ray
        self._facts = facts
        self._constants = constants
        self._own = own
        self._lock = threading.Lock()
        self._seen = (UNKNOWN, 0, now())
        """The last observation, how often in a row, and since when."""
        self.state, self.reason, self.since = UNKNOWN, "Ray is starting", now()

    def run(self, stop: threading.Event, poke: threading.Event) -> None:
        """Until ``stop``; looks at once when ``poke`` is set (a run began)."""
        while not stop.is_set():
            self.look()
            poke.wait(self._constants.activity_s)
            poke.clear()

    def look(self) -> tuple[str, str]:
        """Asks afresh; the answer is undamped, what is told is damped."""
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
            self._facts.add("activity", activity=state, since=since, reason=reason[:300])

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return {"activity": self.state, "activity_since": self.since, "activity_reason": self.reason[:300]}
