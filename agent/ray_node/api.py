"""Ray's own HTTP API on this head (dashboard, Jobs, State, Serve). Only the agent calls it."""

from __future__ import annotations

import http.client
import json
from typing import Any

from agent.channel import Http

SERVE = "/api/serve/applications/"
ALIVE_ACTORS = "/api/v0/actors?limit=1000&filter_keys=state&filter_predicates=!%3D&filter_values=DEAD"


class RayUnavailable(Exception):
    """Ray's dashboard did not answer, or not as expected."""


class RayRefused(Exception):
    """Ray answered with an error."""

    def __init__(self, status: int, text: str) -> None:
        self.status = status
        super().__init__(text)


class RayApi:
    def __init__(self, address: str, token: str) -> None:
        self._http = Http(f"http://{address}")
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}

    def _call(self, method: str, path: str, body: Any = None, timeout_s: float = 10.0) -> Any:
        data = None if body is None else json.dumps(body).encode()
        try:
            status, raw = self._http.request(method, path, data, self._headers, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise RayUnavailable(f"{method} {path.split('?')[0]}: {error!r}") from None
        if status != 200:
            raise RayRefused(status, raw.decode(errors="replace"))
        try:
            return json.loads(raw) if raw else None
        except ValueError:
            raise RayUnavailable(f"{method} {path.split('?')[0]}: not JSON") from None

    def version(self) -> str:
        """Ray's version; raises RayUnavailable while it starts."""
        try:
            return str(self._call("GET", "/api/version", timeout_s=5)["ray_version"])
        except RayRefused as error:
            raise RayUnavailable(f"/api/version: HTTP {error.status}") from None

    # -- jobs ---------------------------------------------------------------------------------------------------

    def submit(self, spec: dict[str, Any]) -> None:
        """Ray's endpoint is not idempotent: it answers 500 for an id that it already has. That is success."""
        try:
            self._call("POST", "/api/jobs/", spec, timeout_s=60)
        except RayRefused as error:
            if "already exists" not in str(error):
                raise

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """Ray's record of the job; None: Ray has none."""
        try:
            record = self._call("GET", f"/api/jobs/{submission_id}")
        except RayRefused as error:
            if error.status == 404:
                return None
            raise RayUnavailable(f"/api/jobs/{submission_id}: HTTP {error.status}") from None
        return record if isinstance(record, dict) else None

    def stop(self, submission_id: str) -> None:
        """Requests it; ``job`` shows the end. A job that has ended already is success."""
        try:
            self._call("POST", f"/api/jobs/{submission_id}/stop", {})
        except RayRefused as error:
            if error.status != 404:
                raise RayUnavailable(f"/api/jobs/{submission_id}/stop: HTTP {error.status}") from None

    # -- state --------------------------------------------------------------------------------------------------

    def _state(self, path: str) -> list[dict[str, Any]]:
        try:
            answer = self._call("GET", path, timeout_s=15)
            return list(answer["data"]["result"]["result"])
        except (RayRefused, KeyError, TypeError) as error:
            raise RayUnavailable(f"{path.split('?')[0]}: {str(error)[:200]}") from None

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes, dead ones included: ``node_id node_name is_head_node state state_message resources_total``."""
        return self._state("/api/v0/nodes?detail=1&limit=10000")

    def actors(self) -> list[dict[str, Any]]:
        """All actors that are not dead: ``class_name name ray_namespace state job_id``."""
        return self._state(ALIVE_ACTORS)

    def driver_reason(self) -> str:
        """Why Ray calls its drivers active; "" when none is."""
        try:
            driver = self._call("GET", "/api/component_activities")["driver"]
        except (RayRefused, KeyError, TypeError) as error:
            raise RayUnavailable(f"/api/component_activities: {str(error)[:200]}") from None
        if driver["is_active"] == "INACTIVE":
            return ""
        if driver["is_active"] == "ACTIVE":
            return str(driver.get("reason") or "a driver is connected")
        raise RayUnavailable(f"/api/component_activities: {str(driver)[:200]}")

    # -- Serve --------------------------------------------------------------------------------------------------

    def serve_applications(self) -> list[str]:
        return sorted(self.serve_details()["applications"])

    def serve_details(self, timeout_s: float = 15.0) -> dict[str, Any]:
        """Ray's ``ServeInstanceDetails``; without applications when Serve does not run. Holds the deployed env
        values."""
        try:
            answer = self._call("GET", SERVE, timeout_s=timeout_s)
            dict(answer["applications"])
        except (RayRefused, KeyError, TypeError, ValueError) as error:
            raise RayUnavailable(f"{SERVE}: {str(error)[:200]}") from None
        return dict(answer)

    def serve_deploy(self, config: dict[str, Any], timeout_s: float) -> None:
        """Replaces all of Serve's applications; Ray starts Serve with the first one. Asynchronous: ``serve_details``
        has the status from this call's end on. Raises RayRefused, whose text may hold env values."""
        self._call("PUT", SERVE, config, timeout_s=timeout_s)
