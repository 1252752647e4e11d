"""JobWorkflow: one per job, from acceptance to its end.

A run is: get a cluster, submit to its head, wait for the end, decide. Causes are counted separately: the application's
failures use up ``max_retries``, the infrastructure's never do and are limited by time.

Undo: however it ends, the lease is released, and a cluster of the job's own ends with it.
"""

from __future__ import annotations

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from heliostat.models.jobs import JobState, Run
    from runtime.messages.clusters import ClusterNotice, NodeFact
    from runtime.messages.common import TerminateRequest
    from runtime.messages.jobs import JobInput
    from workflows import policies
    from workflows.entity.life import shield
    from workflows.entity.recorder import Recorder
    from workflows.jobs.lease import ClusterLease
    from workflows.jobs.progress import JobProgress
    from workflows.jobs.records import JobRecords
    from workflows.jobs.retries import Retries
    from workflows.jobs.run import Runs
    from workflows.jobs.state import JobData, Outcome, infrastructure


@workflow.defn
class JobWorkflow:
    @workflow.init
    def __init__(self, request: JobInput) -> None:
        self.s = JobData(state_since=workflow.now())
        recorder = Recorder(request.job_id, shown=JobState.STARTING.value)
        self.progress = JobProgress(self.s, recorder)
        self.lease = ClusterLease(request, self.s)
        self.records = JobRecords(request, self.s, recorder, self.lease)
        self.runs = Runs(request, self.s, recorder, self.progress, self.lease, self.records)
        self.retries = Retries(request, self.s, self.progress)

    # --- messages -----------------------------------------------------------------------------------------

    @workflow.signal(description="The leased cluster changed")
    def cluster_changed(self, notice: ClusterNotice) -> None:
        self.lease.update(notice)

    @workflow.signal(description="A run started or ended")
    def run_fact(self, fact: NodeFact) -> None:
        self.runs.reports.add(fact)

    @workflow.update(description="End the job")
    def terminate(self, request: TerminateRequest) -> None:
        self.progress.terminate(request)

    # --- lifecycle ----------------------------------------------------------------------------------------

    @workflow.run
    async def run(self, _: JobInput) -> str:
        await shield(self._live(), self.progress.terminate)
        return "withdrawn" if self.s.cancelled else f"{self.s.state}: {self.s.reason}"  # words: ok

    async def _live(self) -> None:
        while not self.s.state.settled:
            if self.s.terminate is not None:
                self.progress.enter_terminated()
                break
            run = self.runs.new()
            outcome = await self._execute(run)
            if self.s.cancelled:
                self.progress.enter(JobState.TERMINATED, "the request was cancelled")
                break
            self.progress.close_run(run, outcome)
            self.retries.decide(run, outcome)
            if not self.s.state.settled:
                await self.records.flush()
                await self._back_off(outcome)
        # The job's end does not wait for its cluster's.
        await self.records.flush_end()
        await self.lease.release()

    async def _execute(self, run: Run) -> Outcome:
        if self.s.terminate is None:
            failed = await self._have_cluster(run)
            if failed is not None:
                return failed
        if self.s.terminate is None and not self.s.cancelled:
            return await self.runs.execute(run)
        return await self.runs.stop(run)

    async def _have_cluster(self, run: Run) -> Outcome | None:
        """Until the leased cluster is ready; how the run ended before it began, if it did."""
        if self.lease.is_ready():
            run.cluster_id = self.lease.cluster_id
            return None  # the fast path: a retry on the same healthy cluster
        failure = await self.lease.request()
        run.cluster_id = self.lease.cluster_id
        if failure is not None:
            return infrastructure(failure)
        while not self.s.cancelled and self.s.terminate is None:
            if self.lease.is_ready():
                return None
            ended = self.lease.ended()
            if ended is not None:
                return ended
            self.progress.set_waiting_on(self.lease.waiting_on())
            await self.records.flush()
            changed = await self.progress.wait(self.lease.changed(), policies.LEASE_RECHECK, "ask the cluster again")
            if not changed and (failure := await self.lease.acquire()) is not None:
                return infrastructure(failure)
        return None

    async def _back_off(self, outcome: Outcome) -> None:
        wait = self.retries.back_off(outcome)
        if wait:
            self.progress.set_waiting_on(f"{wait.total_seconds():.0f} s before the next attempt ({outcome.reason})")
            await self.records.flush()
            await self.progress.wait(lambda: False, wait, "back-off after an infrastructure failure")
