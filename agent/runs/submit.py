"""Submits a run to Ray's Jobs API, once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from agent.commands import CommandRefused
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayRefused, RayUnavailable

log = logging.getLogger("agent.runs.submit")


def job_spec(run_id: str, args: dict[str, Any], packages: Packages) -> dict[str, Any]:
    """Ray's job spec. Raises CommandRefused or PackageFailed."""
    runtime_env: dict[str, Any] = {
        "env_vars": {
            # At its limit Ray's autoscaler writes into the job's log every second that it can't add nodes.
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


def submit_to_ray(ray: RayApi, run_id: str, spec: dict[str, Any], mask: Callable[[str], str]) -> None:
    """Until Ray has it or refuses it. After a lost answer Ray is asked whether it has the run."""
    reason = ""
    for attempt in range(5):
        try:
            if attempt and ray.job(run_id) is not None:
                return
            ray.submit(spec)
        except RayUnavailable as error:
            reason = str(error)
            log.warning("run %s, attempt %d: Ray did not answer: %s", run_id, attempt + 1, error)
            time.sleep(0.5 * (attempt + 1))
        except RayRefused as error:
            lines = [line for line in str(error).splitlines() if len(line.strip()) > 3] or [""]
            reason = mask(f"Ray answered HTTP {error.status}: {lines[-1][:500]}")
            if error.status < 500 or "status code 400" in str(error):  # an answer of Ray's job agent
                raise CommandRefused(f"Ray refused run {run_id}. {reason}") from None
            # its job agent does not listen yet, for example, just after the head became ready
            log.warning("run %s, attempt %d: %s", run_id, attempt + 1, reason)
            time.sleep(0.5 * (attempt + 1))
        else:
            return
    raise CommandRefused(
        f"Ray on this head does not accept run {run_id}; the command may be repeated. {reason}", retryable=True
    )
