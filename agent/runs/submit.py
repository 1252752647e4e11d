"""Gives a run to Ray's Jobs API, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from agent.packages import Packages
from agent.ray_node.api import RayApi, RayAway, RayRefused

log = logging.getLogger("agent.runs.submit")


class Refusal(Exception):
    """A command that can't be carried out. ``retryable``: it was not begun and may be given again."""

    def __init__(self, message: str, retryable: bool = False) -> None:
        self.retryable = retryable
        super().__init__(message)


def job_spec(run_id: str, args: dict[str, Any], packages: Packages) -> dict[str, Any]:
    """Ray's job spec. Raises Refusal or PackageFailed."""
    runtime_env: dict[str, Any] = {
        "env_vars": {
            # At its limit Ray's autoscaler says in the job's log every second that nothing can be added.
            "RAY_SCHEDULER_EVENTS": "0",
            **{str(k): str(v) for k, v in (args.get("env_vars") or {}).items()},
            "HELIOSTAT_RUN_ID": run_id,
            "HELIOSTAT_JOB_ID": run_id.rpartition("-")[0] or run_id,
        }
    }
    if args.get("working_dir"):
        runtime_env["working_dir"] = packages.uri(args["working_dir"])
    if args.get("py_modules"):
        runtime_env["py_modules"] = [packages.uri(m) for m in args["py_modules"]]
    if args.get("requirements"):
        runtime_env["pip"] = {"packages": [str(r) for r in args["requirements"]], "pip_check": False}
    metadata = {str(k): str(v) for k, v in (args.get("metadata") or {}).items()}
    return {
        "submission_id": run_id,
        "entrypoint": str(args["entrypoint"]),
        "runtime_env": runtime_env,
        "metadata": metadata,
    }


def give(ray: RayApi, run_id: str, spec: dict[str, Any], mask: Callable[[str], str]) -> None:
    """Until Ray has it or refuses it. An answer that got lost is found out by asking for the run."""
    why = ""
    for attempt in range(5):
        try:
            if attempt and ray.job(run_id) is not None:
                return
            ray.submit(spec)
        except RayAway as error:
            why = str(error)
            log.warning("run %s, attempt %d: Ray did not answer: %s", run_id, attempt + 1, error)
            time.sleep(0.5 * (attempt + 1))
        except RayRefused as error:
            lines = [line for line in str(error).splitlines() if len(line.strip()) > 3] or [""]
            why = mask(f"Ray answered HTTP {error.status}: {lines[-1][:500]}")
            if error.status < 500 or "status code 400" in str(error):  # the job agent's own answer, passed on
                raise Refusal(f"Ray refused run {run_id}. {why}") from None
            # e.g. its job agent does not listen yet, a moment after the head became ready
            log.warning("run %s, attempt %d: %s", run_id, attempt + 1, why)
            time.sleep(0.5 * (attempt + 1))
        else:
            return
    raise Refusal(f"Ray on this head does not take run {run_id}; it may be given again. {why}", retryable=True)
