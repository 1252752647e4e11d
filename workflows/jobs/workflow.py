"""JobWorkflow: one per job, from acceptance to its end.

An attempt is: have a cluster → give it the run → hear the end → decide. The agent enforces ``timeout_s`` and
reports the end by itself, so a run costs the same few events whether it takes a second or a week. Causes are
counted apart: the application's failures use up ``max_retries``, the infrastructure's never do and are bounded by time.

Undo: whatever way it ends, the lease is released, and a cluster of the job's own is ended with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from temporalio import workflow
from temporalio.common import SearchAttributeKey
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

with workflow.unsafe.imports_passed_through():
    from activities.commands import CommandActivities, CommandRequest
    from activities.leases import AcquireLease, LeaseActivities, MadeCluster, ReleaseLease
    from activities.records import JobRecord, RecordActivities
    from heliostat.models.agents import CommandKind, FactKind
    from heliostat.models.clusters import Cluster, ClusterState
    from heliostat.models.common import Event, EventLevel, Model
    from heliostat.models.jobs import Job, JobState, Run, RunCause, RunState
    from runtime.messages.clusters import ClusterInput, ClusterNotice, LeaseAnswer, NodeFact, Release
    from runtime.messages.common import TerminateRequest
    from runtime.messages.jobs import JobInput
    from workflows import ids, policies
    from workflows.jobs.view import job_details

STATE = SearchAttributeKey.for_keyword("HeliostatState")

HOPELESS = ("bad_config", "denied", "terminated")
"""Ends of a cluster after which another one would end the same way, or was not wanted."""

LONG_RUN = timedelta(minutes=10)
"""A run that got this far shows that the infrastructure works: its failures are counted anew."""


class Outcome(Model):
    """How one attempt ended."""

    state: RunState
    cause: RunCause | None = None
    reason: str = ""
    exit_code: int | None = None
    final: bool = False
    """No other attempt could end otherwise."""


class JobData(Model):
    state: JobState = JobState.STARTING
    reason: str = ""
    waits_for: str = ""
    state_since: datetime
    revision: int = 0
    runs: list[Run] = []
    clusters: int = 0
    """Clusters made for this job so far."""
    failures: int = 0
    """Runs that the application failed."""
    infrastructure_since: datetime | None = None
    """Since when it has been failing without a run that got far."""
    terminate: TerminateRequest | None = None


@workflow.defn
class JobWorkflow:
    @workflow.init
    def __init__(self, request: JobInput) -> None:
        self.input = request
        self.s = JobData(state_since=workflow.now())
        self.cluster: LeaseAnswer | None = None
        self.cluster_id: str | None = None
        self._cluster_made = False
        self._host: LeaseAnswer | None = None
        """Where the current run was given to."""
        self._events: list[Event] = []
        self._ended_runs: dict[str, NodeFact] = {}
        self._running_runs: dict[str, datetime] = {}
        self._withdrawn = False
        self._warned = ""
        """What was announced for the head's machine and told."""
        self._unwritten = 0
        """Writes in a row that failed."""
        self._writing = asyncio.Lock()
        self._rewriting: asyncio.Task[None] | None = None
        self._shown_state = JobState.STARTING

    # --- what others say ----------------------------------------------------------------------------------

    @workflow.signal(description="The leased cluster changed")
    def cluster_changed(self, notice: ClusterNotice) -> None:
        self._hear(notice)

    @workflow.signal(description="A run started or ended")
    def run_fact(self, fact: NodeFact) -> None:
        run = str(fact.data.get("run_id"))
        if fact.kind == FactKind.RUN_RUNNING:
            self._running_runs.setdefault(run, fact.at)
        elif fact.kind == FactKind.RUN_ENDED:
            self._ended_runs.setdefault(run, fact)  # the first word counts: a second one is a repeat

    @workflow.update(description="End the job")
    def terminate(self, request: TerminateRequest) -> None:
        if self.s.terminate is None:
            self.s.terminate = request

    # --- the life -----------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, _: JobInput) -> str:
        # A cancel from the UI reaches this await alone: a step that it cut off in the middle (the start of a cluster)
        # could not be undone. It means the same as a terminate.
        life = asyncio.create_task(self._live())
        while not life.done():
            try:
                await asyncio.shield(life)
            except asyncio.CancelledError:
                if self.s.terminate is None:
                    self.s.terminate = TerminateRequest(actor="operator", reason="cancelled in Temporal")
        life.result()
        await workflow.wait_condition(workflow.all_handlers_finished)
        return "withdrawn" if self._withdrawn else f"{self.s.state}: {self.s.reason}"

    async def _live(self) -> None:
        await self._attempts()
        await self._finish()

    async def _attempts(self) -> None:
        while not self.s.state.settled:
            if self.s.terminate is not None:
                self._end_terminated()
                return
            run = self._new_run()
            outcome = await self._attempt(run)
            if self._withdrawn:
                self._end(JobState.TERMINATED, "its acceptance was taken back")
                return
            self._close_run(run, outcome)
            self._decide(run, outcome)
            if not self.s.state.settled:
                await self._flush()
                await self._wait_before_retry(outcome)

    async def _attempt(self, run: Run) -> Outcome:
        if self.s.terminate is None:
            lost = await self._have_cluster(run)
            if lost is not None:
                return lost
        if self.s.terminate is None and not self._withdrawn:
            return await self._run_on_cluster(run)
        return await self._stop(run)

    def _decide(self, run: Run, outcome: Outcome) -> None:
        """Retry or end. The infrastructure's failures have a deadline, the application's a number."""
        now = workflow.now()
        if outcome.state == RunState.SUCCEEDED:
            self._end(JobState.SUCCEEDED, f"run {run.number} succeeded")
        elif self.s.terminate is not None:
            self._end_terminated()
        elif outcome.final:
            self._end(JobState.FAILED, outcome.reason)
        elif outcome.cause == RunCause.INFRASTRUCTURE:
            if run.running_at is not None and now - run.running_at >= LONG_RUN:
                self.s.infrastructure_since = None
            self.s.infrastructure_since = self.s.infrastructure_since or now
            limit = timedelta(seconds=self.input.limits.infrastructure_retry_s)
            if now - self.s.infrastructure_since >= limit:
                self._end(JobState.FAILED, f"the infrastructure failed for {limit}: {outcome.reason}")
        elif outcome.cause in (RunCause.APPLICATION, RunCause.TIMEOUT):
            self.s.infrastructure_since = None  # it carried a run to its end
            self.s.failures += 1
            if self.s.failures > self.input.config.max_retries:
                self._end(JobState.FAILED, f"run {run.number} failed, no retries left: {outcome.reason}")
        else:
            self._end(JobState.FAILED, outcome.reason)

    async def _wait_before_retry(self, outcome: Outcome) -> None:
        """The application's retry starts at once; the infrastructure gets time to come back."""
        if outcome.cause != RunCause.INFRASTRUCTURE:
            return
        in_a_row = 0
        for run in reversed(self.s.runs):
            if run.cause != RunCause.INFRASTRUCTURE:
                break
            in_a_row += 1
        wait = policies.backoff(in_a_row - 1)
        if wait:
            self._say(f"{wait.total_seconds():.0f} s before the next attempt ({outcome.reason})")
            await self._flush()
            await self._until(lambda: False, wait, "back-off after an infrastructure failure")

    # --- having a cluster -----------------------------------------------------------------------------------

    async def _have_cluster(self, run: Run) -> Outcome | None:
        """Returns when a leased cluster is ready, None; or how the attempt ended before it began."""
        if self.cluster is not None and self.cluster.ready:
            run.cluster_id = self.cluster_id
            return None  # the fast path: a retry on the same healthy cluster
        failure: str | None = None
        if self.input.cluster_id is not None:
            if self.cluster_id is None:
                run.cluster_id = self.cluster_id = self.input.cluster_id
                failure = await self._ask_lease()
        elif not self._cluster_made:
            failure = await self._make_cluster(run)
        if failure is not None:
            return Outcome(state=RunState.FAILED, cause=RunCause.INFRASTRUCTURE, reason=failure)
        run.cluster_id = self.cluster_id
        while not self._withdrawn and self.s.terminate is None:
            if self.cluster is not None and self.cluster.ready:
                return None
            ended = self._cluster_ended()
            if ended is not None:
                return ended
            starts = self.cluster is None or self.cluster.state == ClusterState.STARTING
            why = "" if starts or self.cluster is None else f" ({self.cluster.reason})"
            self._say(f"cluster {self.cluster_id} to be ready{why}")
            await self._flush()
            changed = await self._until(self._cluster_news(), policies.LEASE_RECHECK, "ask the cluster again")
            if not changed and (failure := await self._ask_lease()) is not None:
                return Outcome(state=RunState.FAILED, cause=RunCause.INFRASTRUCTURE, reason=failure)
        return None

    def _hear(self, said: LeaseAnswer) -> None:
        """Takes what the cluster said, unless it is older than what is known: an answer and a notice may cross."""
        if said.cluster_id != self.cluster_id:
            return
        if self.cluster is None or said.state.settled or said.revision >= self.cluster.revision:
            self.cluster = said

    def _cluster_news(self) -> Callable[[], bool]:
        seen = self.cluster
        return lambda: self.cluster is not seen

    def _cluster_ended(self) -> Outcome | None:
        """What it means when the cluster is, or will be, no more."""
        cluster = self.cluster
        ending = (ClusterState.TERMINATING, ClusterState.TERMINATED, ClusterState.FAILED)
        if cluster is None or cluster.state not in ending:
            return None
        reason = f"cluster {cluster.cluster_id} ended: {cluster.reason}"
        # No other cluster may take the place of one that was named, and some would only end the same way.
        final = self.input.cluster_id is not None or cluster.cause in HOPELESS
        cause = RunCause.CONFIGURATION if cluster.cause in ("bad_config", "denied") else RunCause.INFRASTRUCTURE
        if not final:
            self.cluster, self.cluster_id, self._cluster_made = None, None, False
        return Outcome(state=RunState.FAILED, cause=cause, reason=reason, final=final)

    async def _make_cluster(self, run: Run) -> str | None:
        """Gives the reason when it could not be made; the next attempt then makes the same one, with the same id.
        Undo: the release at the end, which ends a cluster of the job's own."""
        if self.cluster_id is None:
            self.s.clusters += 1
        self.cluster_id = ids.job_cluster_id(self.input.job_id, self.s.clusters)
        run.cluster_id = self.cluster_id
        now = workflow.now()
        name = f"job-{self.input.job_id.removeprefix('job_')}-{self.s.clusters}"
        request = ClusterInput(
            cluster_id=self.cluster_id,
            name=name,
            project_id=self.input.project_id,
            project=self.input.project,
            cloud_id=self.input.cloud_id,
            cloud=self.input.cloud,
            config=self.input.compute_config,
            created_by=self.input.created_by,
            created_at=now,
            tags=self.input.config.tags,
            job_id=self.input.job_id,
            limits=self.input.limits,
        )
        cluster = Cluster(
            id=self.cluster_id,
            name=name,
            project=self.input.project,
            cloud=self.input.cloud,
            state=ClusterState.STARTING,
            reason="asked for by its job",
            compute_config=self.input.compute_config,
            tags=self.input.config.tags,
            created_by=self.input.created_by,
            created_at=now,
            state_since=now,
        )
        try:
            started: bool = await workflow.execute_activity_method(
                LeaseActivities.start_job_cluster,
                MadeCluster(cluster=cluster, input=request),
                summary=f"start cluster {self.s.clusters} of this job",
                **policies.MESSAGE,
            )
        except ActivityError as error:
            return f"its cluster could not be started: {error.cause or error}"
        self._cluster_made, self._withdrawn = True, not started
        return None

    async def _ask_lease(self) -> str | None:
        """Gives the reason when the cluster could not be asked."""
        assert self.cluster_id is not None
        try:
            answer: LeaseAnswer = await workflow.execute_activity_method(
                LeaseActivities.acquire_lease,
                AcquireLease(cluster_id=self.cluster_id, holder=self.input.job_id),
                summary=f"lease cluster {self.cluster_id}",
                **policies.LEASE,
            )
        except ActivityError as error:
            if isinstance(error.cause, ApplicationError) and error.cause.type == "withdrawn":
                self._withdrawn = True
                return None
            return f"cluster {self.cluster_id} could not be asked for a lease: {error.cause or error}"
        self._hear(answer)
        return None

    # --- running --------------------------------------------------------------------------------------------

    async def _run_on_cluster(self, run: Run) -> Outcome:
        """Gives the run to the head and hears how it ends; a head that is replaced meanwhile took it along."""
        self._host = self.cluster
        config = self.input.config

        def lost() -> bool:
            return self._host_lost()

        def news() -> bool:
            return run.id in self._ended_runs or lost() or self.s.terminate is not None

        submit = workflow.start_activity_method(
            CommandActivities.run_command,
            self._command(
                run,
                CommandKind.SUBMIT_RUN,
                entrypoint=config.entrypoint,
                working_dir=config.working_dir,
                py_modules=config.py_modules,
                requirements=config.requirements,
                env_ref=self.input.env_ref,
                timeout_s=config.timeout_s,
                metadata={"job_id": self.input.job_id, "job_name": self.input.name, "run": str(run.number)},
            ),
            summary=f"give run {run.number} to the head",
            schedule_to_close_timeout=policies.SUBMIT_TIMEOUT,
            **policies.COMMAND,
        )
        await workflow.wait_condition(lambda: submit.done() or news())
        if not submit.done():
            submit.cancel()  # the run's end, the cluster's or the job's has come first
        elif (error := submit.exception()) is not None and not news():
            if not isinstance(error, ActivityError):
                raise error
            if not isinstance(error.cause, ApplicationError):
                await self._stop(run)  # no answer in time is not a no: it must not start after it was given up
            if run.id not in self._ended_runs:
                return self._refused(error)

        while not news():
            if self._head_goes():
                assert self.cluster is not None
                self._warned = self.cluster.notice
                self._event("head_notice", f"{self._warned}; run {run.number} goes on until then")
                await self._flush()
                continue
            running = run.id in self._running_runs
            if running and run.state == RunState.STARTING:
                run.state, run.running_at = RunState.RUNNING, self._running_runs[run.id]
                self._enter(JobState.RUNNING, f"run {run.number} is running")
                self._event("run_running", f"run {run.number} on cluster {run.cluster_id}")
                await self._flush()
            elif not running and self._has_setup() and not self.s.waits_for.startswith("Ray"):
                self._say("Ray to set up the code and the requirements, then to start the entry point")
                await self._flush()
                continue
            limit = None
            if run.running_at is not None and config.timeout_s is not None:
                limit = (
                    run.running_at + timedelta(seconds=config.timeout_s) + policies.TIMEOUT_BACKSTOP - workflow.now()
                )
            woken = await self._until(
                lambda: (
                    news() or (run.state == RunState.STARTING and run.id in self._running_runs) or self._head_goes()
                ),
                limit,
                "timeout_s has passed and the agent is silent",
            )
            if not woken:
                await self._stop(run)
                return Outcome(
                    state=RunState.FAILED, cause=RunCause.TIMEOUT, reason=f"ran longer than {config.timeout_s:g} s"
                )
        if run.id in self._ended_runs:
            return self._classify(run, self._ended_runs[run.id])
        if lost():
            ended = self._cluster_ended()
            reason = self.cluster.reason if self.cluster else "the cluster is gone"
            return ended or Outcome(state=RunState.FAILED, cause=RunCause.INFRASTRUCTURE, reason=reason)
        return await self._stop(run)

    def _head_goes(self) -> bool:
        """The cloud has announced that it takes the head's machine, and that is news."""
        return self.cluster is not None and self.cluster.notice not in ("", self._warned)

    def _has_setup(self) -> bool:
        """Without any, the entry point starts within a second or two: not worth an event to say what it waits for."""
        config = self.input.config
        return bool(config.working_dir or config.py_modules or config.requirements)

    def _refused(self, error: ActivityError) -> Outcome:
        """The head did not take the run: a fence that is being lifted, a head that is going. Not the user's doing."""
        return Outcome(
            state=RunState.FAILED,
            cause=RunCause.INFRASTRUCTURE,
            reason=f"the head did not take the run: {getattr(error.cause, 'message', None) or error.cause or error}",
        )

    def _classify(self, run: Run, fact: NodeFact) -> Outcome:
        """Whose failure it is. Source of the error words: heliostat.models.agents.FactKind.RUN_ENDED."""
        status, error = str(fact.data.get("status")), str(fact.data.get("error") or "")
        message = str(fact.data.get("message") or "")
        code = fact.data.get("exit_code")
        exit_code = int(code) if isinstance(code, int) else None
        if run.running_at is None and run.id in self._running_runs:
            run.running_at = self._running_runs[run.id]
        if status == "SUCCEEDED":
            return Outcome(state=RunState.SUCCEEDED, exit_code=exit_code if exit_code is not None else 0)
        if fact.data.get("timed_out"):
            limit = self.input.config.timeout_s or 0
            return Outcome(
                state=RunState.FAILED,
                cause=RunCause.TIMEOUT,
                reason=f"ran longer than {limit:g} s",
                exit_code=exit_code,
            )
        if status == "STOPPED":
            reason = message or "stopped on the cluster"
            return Outcome(state=RunState.STOPPED, cause=RunCause.STOPPED, reason=reason, exit_code=exit_code)
        cause = {
            "runtime_env": RunCause.CONFIGURATION,
            "supervisor": RunCause.INFRASTRUCTURE,
            "driver_lost": RunCause.INFRASTRUCTURE,
        }.get(error, RunCause.APPLICATION)
        reason = message or (f"exit code {exit_code}" if exit_code is not None else "failed without a message")
        return Outcome(state=RunState.FAILED, cause=cause, reason=reason, exit_code=exit_code)

    async def _stop(self, run: Run) -> Outcome:
        """The old driver is dead before anything else happens; if the head can't say so, its cluster's end does."""
        if self._host is not None and run.id not in self._ended_runs and not self._host_lost():
            stop = workflow.start_activity_method(
                CommandActivities.run_command,
                self._command(run, CommandKind.STOP_RUN),
                summary=f"stop run {run.number}",
                schedule_to_close_timeout=policies.STOP_TIMEOUT,
                **policies.COMMAND,
            )
            await workflow.wait_condition(lambda: stop.done() or self._host_lost())
            if not stop.done():
                stop.cancel()  # its head is gone, and the run with it
            elif (error := stop.exception()) is not None:
                self._event("stop_unconfirmed", f"{getattr(error, 'cause', None) or error}", level=EventLevel.WARNING)
        if run.id in self._ended_runs:
            outcome = self._classify(run, self._ended_runs[run.id])
            if outcome.state == RunState.SUCCEEDED:
                return outcome  # it was faster than the stop: what is done is done
        reason = self.s.terminate.reason if self.s.terminate else ""
        return Outcome(state=RunState.STOPPED, cause=RunCause.STOPPED, reason=reason or "stopped")

    def _host_lost(self) -> bool:
        """The head that the run was given to is gone, or its cluster is ending."""
        now, then = self.cluster, self._host
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

    # --- ending ---------------------------------------------------------------------------------------------

    async def _finish(self) -> None:
        """Releases what the job holds. Its word on how it ended does not wait for the cluster's end."""
        await self._flush()
        if self._rewriting is not None:
            await self._rewriting  # an end that the records have not taken is told until they have
        while self.cluster_id is not None:
            try:
                await workflow.execute_local_activity_method(
                    LeaseActivities.release_lease,
                    ReleaseLease(
                        cluster_id=self.cluster_id,
                        release=Release(
                            holder=self.input.job_id,
                            end=self.input.cluster_id is None,
                            reason=f"its job {self.s.state}",
                        ),
                    ),
                    summary=f"release cluster {self.cluster_id}",
                    **policies.RELEASE,
                )
                return
            except FailureError as error:  # never given up: it may own a cluster
                workflow.logger.error("cluster %s can't be released: %s", self.cluster_id, error.cause or error)
                await workflow.sleep(10, summary="the cluster could not be told: tell it again")

    def _new_run(self) -> Run:
        number = len(self.s.runs) + 1
        run = Run(
            id=ids.run_id(self.input.job_id, number),
            number=number,
            state=RunState.STARTING,
            started_at=workflow.now(),
        )
        self.s.runs.append(run)
        self._host = None
        return run

    def _close_run(self, run: Run, outcome: Outcome) -> None:
        run.state, run.cause, run.reason = outcome.state, outcome.cause, outcome.reason
        run.exit_code, run.ended_at = outcome.exit_code, workflow.now()
        level = EventLevel.INFO if outcome.state == RunState.SUCCEEDED else EventLevel.WARNING
        why = f" ({outcome.cause}: {outcome.reason})" if outcome.cause else ""
        self._event("run_ended", f"run {run.number} {outcome.state}{why}", level=level)
        self.s.waits_for = ""

    def _end_terminated(self) -> None:
        assert self.s.terminate is not None
        why = f": {self.s.terminate.reason}" if self.s.terminate.reason else ""
        self._end(JobState.TERMINATED, f"terminated by {self.s.terminate.actor}{why}")

    def _end(self, state: JobState, reason: str) -> None:
        self._enter(state, reason)
        self.s.waits_for = ""

    def _enter(self, state: JobState, reason: str) -> None:
        if state != self.s.state:
            self.s.state, self.s.state_since = state, workflow.now()
            actor = self.s.terminate.actor if state == JobState.TERMINATED and self.s.terminate else ""
            level = EventLevel.ERROR if state == JobState.FAILED else EventLevel.INFO
            self._event("state", f"{state}: {reason}", level=level, actor=actor)
        self.s.reason = reason
        self.s.waits_for = ""

    def _say(self, waits_for: str) -> None:
        self.s.waits_for = waits_for

    def _event(self, kind: str, message: str, *, level: EventLevel = EventLevel.INFO, actor: str = "") -> None:
        self._events.append(
            Event(
                id="",
                resource_id=self.input.job_id,
                at=workflow.now(),
                level=level,
                kind=kind,
                actor=actor or self.input.job_id,
                message=message,
            )
        )

    async def _until(self, done: Callable[[], bool], timeout: timedelta | None, why: str) -> bool:
        """Waits for ``done`` or for somebody to end the job; False when ``timeout`` passed first."""
        try:
            await workflow.wait_condition(
                lambda: done() or self.s.terminate is not None, timeout=timeout, timeout_summary=why
            )
        except TimeoutError:
            return False
        return True

    async def _flush(self) -> None:
        """Writes the projection; shows the same in the Temporal UI. While the records are out of reach it is written
        again and again beside what the job does."""
        async with self._writing:
            await self._write()
        if self._unwritten and self._rewriting is None:
            self._rewriting = asyncio.create_task(self._rewrite())

    async def _rewrite(self) -> None:
        while self._unwritten:
            await workflow.sleep(policies.rewrite_after(self._unwritten), summary="records out of reach: write again")
            async with self._writing:
                if self._unwritten:
                    await self._write()
        self._rewriting = None

    async def _write(self) -> None:
        self.s.revision += 1
        events, self._events = self._events, []
        for index, event in enumerate(events):
            event.id = ids.event_id(self.input.job_id, self.s.revision, index)
        job = self._resource()
        workflow.set_current_details(job_details(job))
        if self._shown_state != self.s.state:
            self._shown_state = self.s.state
            workflow.upsert_search_attributes([STATE.value_set(str(self.s.state))])
        try:
            recorded = await workflow.execute_local_activity_method(
                RecordActivities.record_job,
                JobRecord(job=job, events=events),
                summary=f"record {self.s.state}",
                **policies.RECORD,
            )
        except FailureError:  # see policies.RECORD
            self._events = events + self._events
            self._unwritten += 1
            workflow.logger.error("records out of reach")
            return
        self._unwritten = 0
        if not recorded.wanted:
            self._withdrawn = True

    def _resource(self) -> Job:
        return Job(
            id=self.input.job_id,
            name=self.input.name,
            project=self.input.project,
            state=self.s.state,
            reason=self.s.reason,
            waits_for=self.s.waits_for,
            config=self.input.config,
            runs=self.s.runs,
            cluster_id=self.cluster_id,
            created_by=self.input.created_by,
            created_at=self.input.created_at,
            state_since=self.s.state_since,
            ended_at=self.s.state_since if self.s.state.settled else None,
            schedule_id=self.input.schedule_id,
            tags=self.input.config.tags,
            revision=self.s.revision,
        )
