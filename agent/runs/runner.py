"""Runs on this head: submitted to Ray's Jobs API once, watched on localhost, ended for certain.

The entry point runs on the head (it requests no resources, so Ray places it there): its log and its processes are on
this machine. A run's processes end with it: processes that its driver left in sessions of their own are killed. Ray's
workers are not, for Ray ends them itself when the job ends (a detached actor may live on).
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
from agent.commands import CommandRefused
from agent.constants import Constants
from agent.events import Events
from agent.journal import Journal
from agent.logs import LogShipper
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayUnavailable
from agent.runs.reasons import summarize
from agent.runs.submit import job_spec, submit_to_ray

log = logging.getLogger("agent.runs.runner")
MASK = "********"
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")
ERRORS = {
    "RUNTIME_ENV_SETUP_FAILURE": "runtime_env",
    "JOB_ENTRYPOINT_COMMAND_ERROR": "entrypoint",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR": "entrypoint",
}
"""Ray's ``error_type`` → the protocol's; every other one is ``supervisor``."""

MAX_FAILED_POLLS = 20
"""Then the agent fails, and with it the node: the cluster replaces it, and the job runs again."""

KILL_WAIT_S = 10.0
"""The end of a run waits this long for its processes to die by SIGKILL. That takes milliseconds, but longer on a busy
machine, and a process that hangs in the kernel never dies."""


@dataclass
class Run:
    id: str
    timeout_s: float | None
    secrets: list[str] = field(repr=False)
    """Values that no message may contain."""
    submitted: bool = False
    """Ray has it."""
    accepted_at: float = field(default_factory=time.monotonic)
    running_at: float | None = None
    timed_out: bool = False
    stop_requested_at: float | None = None
    next_poll: float = 0.0
    next_scan: float = 0.0
    empty_scans: int = 0
    failed_polls: int = 0
    """In a row, by an error of the agent's or an unexpected answer of Ray's."""
    ended: threading.Event = field(default_factory=threading.Event)
    result: dict[str, Any] | None = None

    def mask(self, text: str) -> str:
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, MASK)
        return text


class Runs:
    def __init__(
        self, ray: RayApi, events: Events, logs: LogShipper, packages: Packages, journal: Journal, constants: Constants,
        logs_dir: Path, mark: str,
    ) -> None:  # fmt: skip
        self._ray = ray
        self._events = events
        self._logs = logs
        self._packages = packages
        self._journal = journal
        self._constants = constants
        self._logs_dir = logs_dir
        self._mark = mark
        self._lock = threading.Lock()
        self._submitting: dict[str, threading.Lock] = {}
        self._active: dict[str, Run] = {}
        self._finished: dict[str, dict[str, Any]] = {}
        """Runs that never start on this node again: their result, or status UNKNOWN."""
        self._wake = threading.Event()
        self.on_started: Callable[[], None] = lambda: None
        """Called when a run has started: activity is refreshed."""
        self.fenced = False
        for record in journal.records:
            if "fence" in record:
                self.fenced = bool(record["fence"])
            elif record.get("accepted"):
                self._finished[record["run"]] = {"status": "UNKNOWN", "exit_code": None}  # an earlier Ray's
            elif "result" in record:
                self._finished[record["run"]] = record["result"]

    def busy(self) -> str:
        """The work under way; "": none."""
        with self._lock:
            if self._active:
                return f"run {next(iter(self._active))}" + (" and others" if len(self._active) > 1 else "")
        return "downloading a package" if self._packages.downloading else ""

    def fence(self, on: bool) -> None:
        with self._lock:
            self._journal.append({"fence": on})
            self.fenced = on

    # -- submit -------------------------------------------------------------------------------------------------

    def submit(self, args: dict[str, Any]) -> dict[str, Any]:
        """Submits the run to Ray; repeatable. Raises CommandRefused."""
        run_id = str(args["run_id"])
        with self._lock:
            lock = self._submitting.setdefault(run_id, threading.Lock())
        with lock:
            with self._lock:
                if run_id in self._active:
                    return {"accepted": True}
                self._check_may_start(run_id)
            spec = job_spec(run_id, args, self._packages)
            timeout = args.get("timeout_s")
            secrets = [str(v) for v in (args.get("env_vars") or {}).values() if len(str(v)) >= 4]
            run = Run(run_id, float(timeout) if timeout else None, secrets)
            with self._lock:
                self._check_may_start(run_id)  # packages take time: a fence or a stop may have come meanwhile
                self._active[run_id] = run
            try:
                self._journal.append({"run": run_id, "accepted": True})
                self._logs.add(f"runs/{run_id}.log", self._logs_dir / f"job-driver-{run_id}.log")
                submit_to_ray(self._ray, run_id, spec, run.mask)
            except (CommandRefused, OSError):
                with self._lock:
                    del self._active[run_id]
                run.result = {"status": "UNKNOWN", "exit_code": None}
                run.ended.set()  # a stop may wait for it
                raise
            run.submitted = True
            self.on_started()
            self._wake.set()
        return {"accepted": True}

    def _check_may_start(self, run_id: str) -> None:
        """Under the lock. Raises CommandRefused."""
        if run_id in self._finished:
            status = self._finished[run_id]["status"]
            raise CommandRefused(
                f"run {run_id} has ended or was stopped on this head (status {status}); start a new run"
            )
        if self.fenced:
            raise CommandRefused("fenced")

    # -- watch --------------------------------------------------------------------------------------------------

    def watch(self, stop: threading.Event) -> None:
        """Polls all runs until ``stop``."""
        while not stop.is_set():
            with self._lock:
                runs = [r for r in self._active.values() if r.submitted]
            if not runs:
                self._wake.wait(1.0)
                self._wake.clear()
                continue
            now = time.monotonic()
            for run in runs:
                if now >= run.next_poll:
                    try:
                        self._poll(run)
                        run.failed_polls = 0
                    except RayUnavailable as error:
                        log.warning("run %s can't be polled: %s", run.id, error)
                        run.next_poll = time.monotonic() + self._constants.run_poll_old_s
                    except Exception:
                        # It is not raised at once, for the other runs and the node would fail with it. It is raised in
                        # the end, for a run that can't be polled never ends, while a lost head is replaced.
                        run.failed_polls += 1
                        if run.failed_polls >= MAX_FAILED_POLLS:
                            raise
                        log.exception("run %s can't be polled (%d times in a row)", run.id, run.failed_polls)
                        run.next_poll = time.monotonic() + self._constants.run_poll_old_s
            soonest = min((r.next_poll for r in runs), default=now)
            self._wake.wait(max(0.01, soonest - time.monotonic()))
            self._wake.clear()

    def _poll(self, run: Run) -> None:
        constants, at = self._constants, time.monotonic()
        age = at - (run.running_at or run.accepted_at)
        young = age < constants.run_young_s or run.stop_requested_at is not None
        slow = constants.run_poll_old_s if age > constants.run_old_s else constants.run_poll_s
        run.next_poll = at + (constants.run_poll_young_s if young else slow)
        record = self._ray.job(run.id)
        if record is None:
            if run.stop_requested_at is not None:
                self._end(run, "STOPPED", None, "stopped before Ray had it", "")
            elif age > constants.stop_kill_s:
                self._end(run, "FAILED", None, "Ray no longer has this run", "driver_lost")
            return
        status = record["status"]
        ran = status == "RUNNING" or record.get("driver_exit_code") is not None  # a short one has ended already
        if ran and run.running_at is None:
            run.running_at = at
            self._events.add("run_running", run_id=run.id)
        if status in TERMINAL:
            error = ""
            if status == "FAILED":
                error = ERRORS.get(str(record.get("error_type")), "supervisor")
            message = summarize(run.mask(str(record.get("message") or "")))
            self._end(run, status, record.get("driver_exit_code"), message, error)
            return
        if run.timeout_s and run.running_at and at - run.running_at >= run.timeout_s and run.stop_requested_at is None:
            log.info("run %s has reached its timeout of %.0f s", run.id, run.timeout_s)
            run.timed_out = True
            run.stop_requested_at = at
            run.next_poll = at + constants.run_poll_young_s
            self._ray.stop(run.id)
        elif run.stop_requested_at is not None:
            self._enforce_stop(run, at)
        elif status == "RUNNING":
            self._check_driver(run, at)

    def _enforce_stop(self, run: Run, at: float) -> None:
        """After a stop request. Repeats it while the run is pending, for Ray drops a stop before the run's supervisor
        exists. Kills a run that does not end."""
        requested_at = run.stop_requested_at or at
        if at - requested_at > self._constants.stop_kill_s:
            log.warning("run %s did not end within %.0f s of its stop; killing it", run.id, at - requested_at)
            processes.kill(list(self._processes(run.id)))
            if at - requested_at > 2 * self._constants.stop_kill_s:
                self._end(run, "STOPPED", None, "killed: Ray did not end it", "")
        elif at >= run.next_scan:
            run.next_scan = at + 1.0
            self._ray.stop(run.id)

    def _check_driver(self, run: Run, at: float) -> None:
        """A run without processes has ended, even if Ray calls it RUNNING: Ray can miss the end."""
        if at < run.next_scan:
            return
        run.next_scan = at + self._constants.driver_scan_s
        if next(self._processes(run.id), None) is not None:
            run.empty_scans = 0
            return
        run.empty_scans += 1
        if run.empty_scans >= self._constants.driver_lost_scans:
            self._end(run, "FAILED", None, "Ray calls it RUNNING, but it has no process left", "driver_lost")

    def _end(self, run: Run, status: str, exit_code: int | None, message: str, error: str) -> None:
        """In this order: no process of the run is left, its log is in the bucket, its end is reported."""
        self._kill_remaining(run.id)
        if not self._logs.flush(self._constants.run_log_flush_s, f"runs/{run.id}.log"):
            log.error("run %s: its log is not complete in the bucket yet; reporting its end all the same", run.id)
        if run.timed_out and status != "SUCCEEDED":
            status, message, error = "FAILED", f"ran longer than its timeout_s of {run.timeout_s:g} s", ""
        else:
            run.timed_out = False  # it ended by itself at the same moment
        message = run.mask(message)[-self._constants.message_max_chars :]
        run.result = {"status": status, "exit_code": exit_code}
        with self._lock:
            self._journal.append({"run": run.id, "result": run.result})
            self._finished[run.id] = run.result
            self._active.pop(run.id, None)
            self._submitting.pop(run.id, None)
        self._events.add(
            "run_ended", run_id=run.id, status=status, exit_code=exit_code, message=message, error=error,
            timed_out=run.timed_out,
        )  # fmt: skip
        run.ended.set()

    def _processes(self, run_id: str) -> Iterator[int]:
        return processes.with_environ(self._mark, f"HELIOSTAT_RUN_ID={run_id}")

    def _kill_remaining(self, run_id: str) -> None:
        deadline = time.monotonic() + KILL_WAIT_S
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
        log.error("run %s: processes survive SIGKILL: %s", run_id, left)

    # -- stop ---------------------------------------------------------------------------------------------------

    def stop(self, run_id: str) -> dict[str, Any]:
        """Ends it and returns ``{status, exit_code}`` once none of its processes is left; it never starts
        afterwards."""
        with self._lock:
            run = self._active.get(run_id)
            if run is None:
                if run_id not in self._finished:
                    # Also during the download of its packages: the submission checks this before it goes on.
                    self._finished[run_id] = {"status": "UNKNOWN", "exit_code": None}
                    self._journal.append({"run": run_id, "result": self._finished[run_id]})
                return dict(self._finished[run_id])
            lock = self._submitting.setdefault(run_id, threading.Lock())
        with lock:  # Ray has it from here on, or has refused it
            if run.stop_requested_at is None:
                run.stop_requested_at = time.monotonic()
            run.next_poll = 0.0
        if run.ended.is_set():
            return self._final_result(run_id, run)
        try:
            self._ray.stop(run_id)
        except RayUnavailable as error:
            log.warning("run %s: the stop request failed and is repeated: %s", run_id, error)
        self._wake.set()
        run.ended.wait()
        return self._final_result(run_id, run)

    def _final_result(self, run_id: str, run: Run) -> dict[str, Any]:
        """It ended during the stop, by itself or because Ray refused it. It must not be submitted again."""
        with self._lock:
            if run_id not in self._finished:
                self._finished[run_id] = dict(run.result or {})
                self._journal.append({"run": run_id, "result": self._finished[run_id]})
            return dict(self._finished[run_id])
