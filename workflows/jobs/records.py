"""The job's records. While they are unreachable, the job keeps running and writes again in the background."""

from __future__ import annotations

import asyncio

from temporalio import workflow

with workflow.unsafe.imports_passed_through():
    from activities.records import JobRecord, RecordActivities
    from runtime.messages.jobs import JobInput
    from workflows import policies
    from workflows.entity.recorder import Recorder
    from workflows.jobs.lease import ClusterLease
    from workflows.jobs.state import JobData
    from workflows.jobs.view import job_details, job_resource


class JobRecords:
    def __init__(self, request: JobInput, state: JobData, recorder: Recorder, lease: ClusterLease) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._lease = lease
        self._writing = asyncio.Lock()
        self._rewriting: asyncio.Task[None] | None = None

    async def flush(self) -> None:
        async with self._writing:
            await self._write()
        if self._recorder.failures and self._rewriting is None:
            self._rewriting = asyncio.create_task(self._rewrite())

    async def flush_end(self) -> None:
        """The records must have the end: waits until they have it."""
        await self.flush()
        if self._rewriting is not None:
            await self._rewriting

    async def _rewrite(self) -> None:
        while failures := self._recorder.failures:
            await workflow.sleep(policies.rewrite_after(failures), summary="records unreachable: write again")
            async with self._writing:
                if self._recorder.failures:
                    await self._write()
        self._rewriting = None

    async def _write(self) -> None:
        self._s.revision += 1
        batch = self._recorder.take(self._s.revision)
        job = job_resource(self._input, self._s, self._lease.cluster_id)
        self._recorder.show(self._s.state, job_details(job))
        recorded = await self._recorder.write(
            batch,
            workflow.execute_local_activity_method(
                RecordActivities.record_job,
                JobRecord(job=job, events=batch.events),
                summary=f"record {self._s.state}",
                **policies.RECORD,
            ),
        )
        if recorded is not None and not recorded.wanted:
            self._s.cancelled = True
