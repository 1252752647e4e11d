"""Runs on this head: given to Ray's Jobs API once, watched on localhost, ended for certain.

The entry point runs on the head (it asks for no resources, so Ray puts it there): its log and its processes are
on this machine. A run's processes end with it: what its driver left behind in sessions of its own is killed,
Ray's workers excepted, which Ray ends itself when the job ends (a detached actor may live on).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent import processes
from agent.constants import Constants
from agent.facts import Facts
from agent.journal import Journal
from agent.logs import LogShipper
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayAway
from agent.runs.reasons import short
from agent.runs.submit import Refusal, give, job_spec

log = logging.getLogger("agent.runs.runner")
MASK = "********"
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
ERRORS = {
    "RUNTIME_ENV_SETUP_FAILURE": "runtime_env",
    "JOB_ENTRYPOINT_COMMAND_ERROR": "entrypoint",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR": "entrypoint",
}
"""Ray's ``error_type`` → ours; every other one is ``supervisor``."""


MAX_FAILED_LOOKS = 20
"""Then the agent fails, and with it the node: its cluster heals, and the job runs again."""


DIE_S = 10.0
"""For so long the end of a run waits for its processes to die by SIGKILL: milliseconds, but each needs a moment of a
processor for it, which a busy machine gives late, and one that hangs in the kernel has none."""


@dataclass
class Run:
    id: str
    timeout_s: float | None
    secrets: list[str] = field(repr=False)
    """Values that must not get into a message."""
    given: bool = False
    """Ray has it."""
    accepted_at: float = field(default_factory=time.monotonic)
    running_at: float | None = None
    timed_out: bool = False
    stop_asked_at: float | None = None
    next_look: float = 0.0
    next_scan: float = 0.0
    empty_scans: int = 0
    failed_looks: int = 0
    """In a row, by a fault of ours or an answer of Ray's that we don't understand."""
    ended: threading.Event = field(default_factory=threading.Event)
    result: dict[str, Any] | None = None

    def mask(self, text: str) -> str:
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return text


class Runs:
    def __init__(
        self, ray: RayApi, facts: Facts, logs: LogShipper, packages: Packages, journal: Journal, constants: Constants,
        logs_dir: Path, mark: str,
    ) -> None:  # fmt: skip
        self._ray = ray
        self._facts = facts
        self._logs = logs
        self._packages = packages
        self._journal = journal
        self._constants = constants
        self._logs_dir = logs_dir
        self._mark = mark
        self._lock = threading.Lock()
        self._submitting: dict[str, threading.Lock] = {}
        self._active: dict[str, Run] = {}
        self._over: dict[str, dict[str, Any]] = {}
        """Runs that will never start on this node (again): their result, or status UNKNOWN."""
        self._wake = threading.Event()
        self.began: Callable[[], None] = lambda: None
        """Called when a run has begun: activity is looked at again."""
        self.fenced = False
        for record in journal.records:
            if "fence" in record:
                self.fenced = bool(record["fence"])
            elif record.get("accepted"):
                self._over[record["run"]] = {"status": "UNKNOWN", "exit_code": None}  # an earlier Ray's
            elif "result" in record:
                self._over[record["run"]] = record["result"]

    def busy(self) -> str:
        """What is under way, "" when nothing is."""
        with self._lock:
            if self._active:
                return f"run {next(iter(self._active))}" + (" and others" if len(self._active) > 1 else "")
        return "a package is being fetched" if self._packages.downloading else ""

    def fence(self, on: bool) -> None:
        with self._lock:
            self._journal.append({"fence": on})
            self.fenced = on

    # -- submit -------------------------------------------------------------------------------------------------

    def submit(self, args: dict[str, Any]) -> dict[str, Any]:
        """Gives the run to Ray; repeatable. Raises Refusal."""
        run_id = str(args["run_id"])
        with self._lock:
            gate = self._submitting.setdefault(run_id, threading.Lock())
        with gate:
            with self._lock:
                if run_id in self._active:
                    return {"accepted": True}
                self._may_start(run_id)
            spec = job_spec(run_id, args, self._packages)
            timeout = args.get("timeout_s")
            secrets = [str(v) for v in (args.get("env_vars") or {}).values() if len(str(v)) >= 4]
            run = Run(run_id, float(timeout) if timeout else None, secrets)
            with self._lock:
                self._may_start(run_id)  # packages take time: it may have been fenced or stopped meanwhile
                self._active[run_id] = run
            try:
                self._journal.append({"run": run_id, "accepted": True})
                self._logs.add(f"runs/{run_id}.log", self._logs_dir / f"job-driver-{run_id}.log")
                give(self._ray, run_id, spec, run.mask)
            except (Refusal, OSError):
                with self._lock:
                    del self._active[run_id]
                run.result = {"status": "UNKNOWN", "exit_code": None}
                run.ended.set()  # a stop may wait for it
                raise
            run.given = True
            self.began()
            self._wake.set()
        return {"accepted": True}

    def _may_start(self, run_id: str) -> None:
        """Under the lock. Raises Refusal."""
        if run_id in self._over:
            status = self._over[run_id]["status"]
            raise Refusal(f"run {run_id} has ended or was stopped on this head (status {status}); start a new run")
        if self.fenced:
            raise Refusal("fenced")

    # -- watch --------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> None:
        """Looks after all runs until ``stop``."""
        while not stop.is_set():
            with self._lock:
                runs = [r for r in self._active.values() if r.given]
            if not runs:
                self._wake.wait(1.0)
                self._wake.clear()
                continue
            now = time.monotonic()
            for run in runs:
                if now >= run.next_look:
                    try:
                        self._look(run)
                        run.failed_looks = 0
                    except RayAway as error:
                        log.warning("run %s can't be looked at: %s", run.id, error)
                        run.next_look = time.monotonic() + self._constants.run_poll_old_s
                    except Exception:
                        # Not at once: the other runs and the node would go down with it. Not for ever: a run that
                        # nobody sees ends never, while a lost head is healed.
                        run.failed_looks += 1
                        if run.failed_looks >= MAX_FAILED_LOOKS:
                            raise
                        log.exception("run %s can't be looked at (%d times in a row)", run.id, run.failed_looks)
                        run.next_look = time.monotonic() + self._constants.run_poll_old_s
            soonest = min((r.next_look for r in runs), default=now)
            self._wake.wait(max(0.01, soonest - time.monotonic()))
            self._wake.clear()

    def _look(self, run: Run) -> None:
        constants, at = self._constants, time.monotonic()
        age = at - (run.running_at or run.accepted_at)
        young = age < constants.run_young_s or run.stop_asked_at is not None
        slow = constants.run_poll_old_s if age > constants.run_old_s else constants.run_poll_s
        run.next_look = at + (constants.run_poll_young_s if young else slow)
        record = self._ray.job(run.id)
        if record is None:
            if run.stop_asked_at is not None:
                self._end(run, "STOPPED", None, "stopped before Ray had it", "")
            elif age > constants.stop_kill_s:
                self._end(run, "FAILED", None, "Ray does not know this run any more", "driver_lost")
            return
        status = record["status"]
        ran = status == "RUNNING" or record.get("driver_exit_code") is not None  # a short one is over already
        if ran and run.running_at is None:
            run.running_at = at
            self._facts.add("run_running", run_id=run.id)
        if status in TERMINAL:
            error = ""
            if status == "FAILED":
                error = ERRORS.get(str(record.get("error_type")), "supervisor")
            self._end(
                run, status, record.get("driver_exit_code"), short(run.mask(str(record.get("message") or ""))), error
            )
            return
        if run.timeout_s and run.running_at and at - run.running_at >= run.timeout_s and run.stop_asked_at is None:
            log.info("run %s has run for %.0f s: its time is over", run.id, run.timeout_s)
            run.timed_out = True
            run.stop_asked_at = at
            run.next_look = at + constants.run_poll_young_s
            self._ray.stop(run.id)
        elif run.stop_asked_at is not None:
            self._press(run, at)
        elif status == "RUNNING":
            self._check_driver(run, at)

    def _press(self, run: Run, at: float) -> None:
        """A stop was asked for. A run that was still pending is asked again (Ray drops a stop before its supervisor
        exists); one that won't end is killed."""
        asked = run.stop_asked_at or at
        if at - asked > self._constants.stop_kill_s:
            log.warning("run %s did not end within %.0f s of its stop; killed", run.id, at - asked)
            processes.kill(list(self._processes(run.id)))
            if at - asked > 2 * self._constants.stop_kill_s:
                self._end(run, "STOPPED", None, "killed: Ray did not end it", "")
        elif at >= run.next_scan:
            run.next_scan = at + 1.0
            self._ray.stop(run.id)

    def _check_driver(self, run: Run, at: float) -> None:
        """A run that Ray calls RUNNING while no process of it is left is over: Ray's own watch can miss it."""
        if at < run.next_scan:
            return
        run.next_scan = at + self._constants.driver_scan_s
        if next(self._processes(run.id), None) is not None:
            run.empty_scans = 0
            return
        run.empty_scans += 1
        if run.empty_scans >= self._constants.driver_lost_scans:
            self._end(run, "FAILED", None, "Ray calls it running, but no process of it is left", "driver_lost")

    def _end(self, run: Run, status: str, exit_code: int | None, message: str, error: str) -> None:
        """The order matters: nothing of the run is left, its log is in the bucket, then its end is told."""
        self._kill_leftovers(run.id)
        if not self._logs.flush(self._constants.run_log_flush_s, f"runs/{run.id}.log"):
            log.error("run %s: its log is not wholly in the bucket yet; its end is told all the same", run.id)
        if run.timed_out and status != "SUCCEEDED":
            status, message, error = "FAILED", f"ran longer than its timeout_s of {run.timeout_s:g} s", ""
        else:
            run.timed_out = False  # it ended by itself in the same moment
        message = run.mask(message)[-self._constants.message_max_chars :]
        run.result = {"status": status, "exit_code": exit_code}
        with self._lock:
            self._journal.append({"run": run.id, "result": run.result})
            self._over[run.id] = run.result
            self._active.pop(run.id, None)
            self._submitting.pop(run.id, None)
        self._facts.add(
            "run_ended", run_id=run.id, status=status, exit_code=exit_code, message=message, error=error,
            timed_out=run.timed_out,
        )  # fmt: skip
        run.ended.set()

    def _processes(self, run_id: str) -> Iterator[int]:
        return processes.with_environ(self._mark, f"HELIOSTAT_RUN_ID={run_id}")

    def _kill_leftovers(self, run_id: str) -> None:
        deadline = time.monotonic() + DIE_S
        while True:
            left = [
                pid for pid in self._processes(run_id)
                if processes.alive(pid) and not processes.command(pid).startswith("ray::")
            ]  # fmt: skip
            if not left:
                return
            if time.monotonic() > deadline:
                break
            processes.kill(left)
            time.sleep(0.02)
        log.error("run %s: processes that would not die: %s", run_id, left)

    # -- stop ---------------------------------------------------------------------------------------------------

    def stop(self, run_id: str) -> dict[str, Any]:
        """Ends it and returns ``{status, exit_code}`` once nothing of it is left; it never starts afterwards."""
        with self._lock:
            run = self._active.get(run_id)
            if run is None:
                if run_id not in self._over:
                    # Also while its packages are on their way: the submission finds this before it goes on.
                    self._over[run_id] = {"status": "UNKNOWN", "exit_code": None}
                    self._journal.append({"run": run_id, "result": self._over[run_id]})
                return dict(self._over[run_id])
            gate = self._submitting.setdefault(run_id, threading.Lock())
        with gate:  # Ray has it from here on, or has refused it
            if run.stop_asked_at is None:
                run.stop_asked_at = time.monotonic()
            run.next_look = 0.0
        if run.ended.is_set():
            return self._never(run_id, run)
        try:
            self._ray.stop(run_id)
        except RayAway as error:
            log.warning("run %s: the stop is asked for again: %s", run_id, error)
        self._wake.set()
        run.ended.wait()
        return self._never(run_id, run)

    def _never(self, run_id: str, run: Run) -> dict[str, Any]:
        """It ended while it was stopped: by itself, or Ray refused it, then it must not be given again."""
        with self._lock:
            if run_id not in self._over:
                self._over[run_id] = dict(run.result or {})
                self._journal.append({"run": run_id, "result": self._over[run_id]})
            return dict(self._over[run_id])
