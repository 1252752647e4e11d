"""One run on a cluster that is ready: the head gets it, the agent reports its start and its end. The agent enforces
``timeout_s``, so a run costs the same few events whether it takes a second or a week."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandRequest
    from heliostat.models.agents import CommandKind, FactKind
    from heliostat.models.common import EventLevel
    from heliostat.models.jobs import JobState, Run, RunState
    from runtime.messages.clusters import LeaseAnswer, NodeFact
    from runtime.messages.jobs import JobInput
    from workflows import ids, policies
    from workflows.entity.commands import CommandAbandoned, run_command
    from workflows.entity.recorder import Recorder
    from workflows.jobs.lease import ClusterLease
    from workflows.jobs.progress import JobProgress
    from workflows.jobs.records import JobRecords
    from workflows.jobs.state import JobData, Outcome, infrastructure, outcome_of, stopped, timed_out


class RunReports:
    """What agents reported of the job's runs."""

    def __init__(self) -> None:
        self.running: dict[str, datetime] = {}
        self.ended: dict[str, NodeFact] = {}

    def add(self, fact: NodeFact) -> None:
        run = str(fact.data.get("run_id"))
        if fact.kind == FactKind.RUN_RUNNING:
            self.running.setdefault(run, fact.at)
        elif fact.kind == FactKind.RUN_ENDED:
            self.ended.setdefault(run, fact)  # the first report counts: a second one is a repeat


class Runs:
    def __init__(
        self,
        request: JobInput,
        state: JobData,
        recorder: Recorder,
        progress: JobProgress,
        lease: ClusterLease,
        records: JobRecords,
    ) -> None:
        self.reports = RunReports()
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._lease = lease
        self._records = records
        self._host: LeaseAnswer | None = None
        """The cluster and head that the current run was submitted to."""
        self._recorded_notice = ""
        """The interruption notice of the head that an event tells about."""

    def new(self) -> Run:
        number = len(self._s.runs) + 1
        run = Run(
            id=ids.run_id(self._input.job_id, number),
            number=number,
            state=RunState.STARTING,
            started_at=workflow.now(),
        )
        self._s.runs.append(run)
        self._host = None
        return run

    async def execute(self, run: Run) -> Outcome:
        """Submits the run and waits for its end. A head that is replaced in between has lost it."""
        self._host = self._lease.cluster
        refused = await self._submit(run)
        if refused is not None:
            return refused
        while not self._over(run):
            if not await self._follow(run):
                await self.stop(run)
                return timed_out(self._input.config.timeout_s or 0)
        if run.id in self.reports.ended:
            return self._reported(run)
        if self._host_lost():
            reason = self._lease.cluster.reason if self._lease.cluster else "the cluster has ended"
            return self._lease.ended() or infrastructure(reason)
        return await self.stop(run)

    def _over(self, run: Run) -> bool:
        """It ended, its head is lost, or the job is to end."""
        return run.id in self.reports.ended or self._host_lost() or self._s.terminate is not None

    async def _submit(self, run: Run) -> Outcome | None:
        """None: the head has the run, or its end came first."""
        config = self._input.config
        request = self._command(
            run,
            CommandKind.SUBMIT_RUN,
            entrypoint=config.entrypoint,
            working_dir=config.working_dir,
            py_modules=config.py_modules,
            requirements=config.requirements,
            env_ref=self._input.env_ref,
            timeout_s=config.timeout_s,
            metadata={"job_id": self._input.job_id, "job_name": self._input.name, "run": str(run.number)},
        )
        try:
            await run_command(
                request,
                summary=f"submit run {run.number} to the head",
                timeout=policies.SUBMIT_TIMEOUT,
                abandon=lambda: self._over(run),
            )
        except CommandAbandoned:
            pass
        except ActivityError as error:
            if self._over(run):
                return None
            if not isinstance(error.cause, ApplicationError):
                await self.stop(run)  # no answer is not a refusal: the run must not start after it counts as failed
            if run.id not in self.reports.ended:
                # A fence that is being lifted, a head that goes: not the user's fault.
                why = getattr(error.cause, "message", None) or error.cause or error
                return infrastructure(f"the head did not take the run: {why}")
        return None

    async def _follow(self, run: Run) -> bool:
        """Until the next change of the run. False: ``timeout_s`` has passed, and the agent is silent."""
        config = self._input.config
        if self._has_new_notice():
            assert self._lease.cluster is not None
            self._recorded_notice = self._lease.cluster.notice
            self._recorder.event("head_notice", f"{self._recorded_notice}; run {run.number} continues until then")
            await self._records.flush()
            return True
        running = run.id in self.reports.running
        if running and run.state == RunState.STARTING:
            run.state, run.running_at = RunState.RUNNING, self.reports.running[run.id]
            self._progress.enter(JobState.RUNNING, f"run {run.number} is running")
            self._recorder.event("run_running", f"run {run.number} on cluster {run.cluster_id}")
            await self._records.flush()
        elif not running and self._has_setup() and not self._s.waits_for.startswith("Ray"):
            self._progress.set_waiting_on("Ray to set up the code and the requirements, then to start the entry point")
            await self._records.flush()
            return True
        limit = None
        if run.running_at is not None and config.timeout_s is not None:
            limit = run.running_at + timedelta(seconds=config.timeout_s) + policies.TIMEOUT_BACKSTOP - workflow.now()

        def changed() -> bool:
            started = run.state == RunState.STARTING and run.id in self.reports.running
            return self._over(run) or started or self._has_new_notice()

        return await self._progress.wait(changed, limit, "timeout_s has passed and the agent is silent")

    def _has_new_notice(self) -> bool:
        """The cloud will take the head's machine, and no event tells about that yet."""
        return self._lease.cluster is not None and self._lease.cluster.notice not in ("", self._recorded_notice)

    def _has_setup(self) -> bool:
        """Without any, the entry point starts within a second or two: not worth a write of what it waits on."""
        config = self._input.config
        return bool(config.working_dir or config.py_modules or config.requirements)

    def _reported(self, run: Run) -> Outcome:
        if run.running_at is None and run.id in self.reports.running:
            run.running_at = self.reports.running[run.id]
        return outcome_of(self.reports.ended[run.id], self._input.config.timeout_s)

    async def stop(self, run: Run) -> Outcome:
        """The driver is dead before anything else happens; if the head can't confirm it, the cluster's end does it."""
        if self._host is not None and run.id not in self.reports.ended and not self._host_lost():
            try:
                await run_command(
                    self._command(run, CommandKind.STOP_RUN),
                    summary=f"stop run {run.number}",
                    timeout=policies.STOP_TIMEOUT,
                    abandon=self._host_lost,
                )
            except CommandAbandoned:
                pass  # its head has ended, and the run with it
            except ActivityError as error:
                self._recorder.event("stop_unconfirmed", f"{error.cause or error}", level=EventLevel.WARNING)
        if run.id in self.reports.ended:
            outcome = self._reported(run)
            if outcome.state == RunState.SUCCEEDED:
                return outcome  # it ended before the stop
        reason = self._s.terminate.reason if self._s.terminate else ""
        return stopped(reason or "stopped")

    def _host_lost(self) -> bool:
        """The head that the run was submitted to has ended, or its cluster ends."""
        now, then = self._lease.cluster, self._host
        return now is None or then is None or not now.ready or now.head_generation != then.head_generation

    def _command(self, run: Run, kind: CommandKind, **args: Any) -> CommandRequest:
        assert self._host is not None
        assert self._host.head_node_id is not None
        return CommandRequest(
            id=f"{run.id}-{kind}",
            cluster_id=self._host.cluster_id,
            node_id=self._host.head_node_id,
            kind=kind,
            args={"run_id": run.id, **args},
        )
