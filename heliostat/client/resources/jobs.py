"""Jobs: submit, get, wait, read logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from heliostat.client.effects import Emit, Flow, Sleep, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.logs import LogReader, LogText, follow_pages
from heliostat.client.resources import lists
from heliostat.client.resources.uploads import check_code, ship_code
from heliostat.client.transport import PATIENT, TRIES, Api, path_of
from heliostat.errors import HeliostatError, InfrastructureError, WaitTimeout, WorkloadFailed
from heliostat.models.common import Event
from heliostat.models.jobs import Job, JobConfig, JobState, JobTerminate, LogPage, RunCause
from heliostat.models.plans import Plan

JOBS = "jobs"


class Jobs(Group[M]):
    @one
    def submit(self, config: JobConfig, *, idempotency_key: str | None = None) -> Flow[Job]:
        """Submits a job. Returns as soon as it is accepted, which is durable.

        Packs and uploads local directories in ``working_dir`` and ``py_modules`` first. The same ``idempotency_key``
        (any text; default: a new one) returns the same job instead of a second one.
        """
        ready = yield from ship_code(self._api, config)
        return (yield from self._api.call("POST", path_of(JOBS), Job, body=ready, key=idempotency_key))

    @one
    def plan(self, config: JobConfig) -> Flow[Plan]:
        """What ``submit`` would create, and its price per hour where the operator's price table has it. Everything is
        checked, local directories are packed, nothing is uploaded or created."""
        ready = yield from check_code(config)
        return (yield from self._api.call("POST", path_of(JOBS), Plan, body=ready, params={"dry_run": True}))

    @one
    def get(self, ref: str, *, project: str | None = None) -> Flow[Job]:
        """By id, or by name: the newest job of that name. ``project``, here and below: the project of the name; needed
        only when several of your projects have it."""
        return (yield from get(self._api, ref, project))

    @many
    def list(
        self,
        *,
        state: JobState | str | Sequence[JobState | str] | None = None,
        name: str | None = None,
        project: str | None = None,
        tags: Mapping[str, str] | None = None,
        cluster: str | None = None,
        schedule: str | None = None,
        page_size: int = lists.PAGE_SIZE,
    ) -> Stream[Job]:
        """Newest first; pages are fetched as you iterate. ``cluster``: the cluster of the newest run; ``schedule``: the
        id of the one that started them."""
        filters = {
            "state": state,
            "name": name,
            "project": project,
            "tag": lists.tag_filter(tags),
            "cluster": cluster,
            "schedule": schedule,
        }
        return lists.pages(self._api, path_of(JOBS), Job, page_size=page_size, **filters)

    @one
    def terminate(self, ref: str, *, reason: str = "", project: str | None = None) -> Flow[Job]:
        """Requests termination, also while its cluster starts; wait for TERMINATED to see it done."""
        path, params = path_of(JOBS, ref, "terminate"), {"project": project}
        return (yield from self._api.call("POST", path, Job, params=params, body=JobTerminate(reason=reason)))

    @many
    def events(self, ref: str, *, project: str | None = None) -> Stream[Event]:
        """Its events, oldest first."""
        return lists.events(self._api, JOBS, ref, project)

    @one
    def wait(
        self,
        ref: str,
        *,
        state: JobState | str | None = JobState.SUCCEEDED,
        timeout: float | None = None,
        on_change: Callable[[Job], None] | None = None,
        project: str | None = None,
    ) -> Flow[Job]:
        """Waits until the job is in ``state``; None: until it has ended. Waits at most ``timeout`` seconds (default: no
        limit) and survives outages of the API. ``on_change`` gets the job at first and after each change.

        Raises WorkloadFailed, or InfrastructureError if that is the cause, as soon as the job can no longer reach the
        state; WaitTimeout.
        """
        wanted = JobState(state) if state is not None else None
        pace = lists.Pace(timeout)
        job = yield from get(self._api, ref, project)
        seen: Job | None = None
        while not reached(job, wanted):
            if on_change and job != seen:
                on_change(job)
            seen = job
            if pace.expired:
                raise WaitTimeout(
                    f"Job {job.name} ({job.id}) is {job.state} after {timeout:g} s, not {wanted or 'settled'}.",
                    remedy=f"The job keeps running. `heliostat job wait {job.id}` waits again.",
                    resource=job.id,
                )
            yield Sleep(pace.next())
            job = yield from get(self._api, job.id, tries=TRIES if timeout is not None else PATIENT)
        return job

    @many
    def logs(
        self,
        ref: str,
        *,
        follow: bool = False,
        run: int | str | None = None,
        tail: int | None = None,
        project: str | None = None,
    ) -> Stream[LogText]:
        """The job's log, as pieces of text, also after its cluster has ended.

        Args:
            follow: continue until the job has ended and its log is complete, across retries; the ``run_id`` of each
                piece is its run. Survives outages of the API.
            run: only this run, by number or id.
            tail: start with this many of the last lines.
        """
        return _logs(self._api, ref, project, follow, run, tail)

    @many
    def watch(self, ref: str, *, project: str | None = None) -> Stream[Job | LogText]:
        """The job at each change, with its log in between, until it has ended and its log is complete."""
        return _watch(self._api, ref, project)


def get(api: Api, ref: str, project: str | None = None, *, tries: float = TRIES) -> Flow[Job]:
    return (yield from api.call("GET", path_of(JOBS, ref), Job, params={"project": project}, tries=tries))


def reached(job: Job, wanted: JobState | None) -> bool:
    """Raises :func:`failure` when the job has ended in another state."""
    if wanted is None:
        return job.state.settled
    if (
        job.state == wanted
        or (wanted is JobState.STARTING)
        or (wanted is JobState.RUNNING and job.state is JobState.SUCCEEDED)
    ):
        return True  # a state that it has passed through counts
    if job.state.settled:
        raise failure(job)
    return False


def failure(job: Job) -> HeliostatError:
    """The error of a job that ended without success: the program failed, or the infrastructure did."""
    last = job.runs[-1] if job.runs else None
    ours = job.state is JobState.FAILED and (last is None or last.cause is RunCause.INFRASTRUCTURE)
    kind: type[HeliostatError] = InfrastructureError if ours else WorkloadFailed
    why = job.reason or (last.reason if last else "")
    ended = (
        "was terminated"
        if job.state is JobState.TERMINATED
        else "succeeded"
        if job.state is JobState.SUCCEEDED
        else "failed"
    )
    return kind(
        f"Job {job.name} ({job.id}) {ended}" + (f": {why.rstrip('.')}." if why else "."),
        remedy=f"`heliostat job logs {job.id}` shows what it printed, `heliostat job events {job.id}` what happened.",
        resource=job.id,
        details={
            "state": job.state,
            "cause": last.cause if last else None,
            "exit_code": last.exit_code if last else None,
        },
    )


def _page(api: Api, ref: str, *, follow: bool, run: int | str | None, tries: float) -> Flow[LogPage]:
    params = {"follow": follow or None, "run": run}
    return (yield from api.call("GET", path_of(JOBS, ref, "logs"), LogPage, params=params, tries=tries))


def _logs(
    api: Api, ref: str, project: str | None, follow: bool, run: int | str | None, tail: int | None
) -> Stream[LogText]:
    job = yield from get(api, ref, project)  # a name selects the newest job: stay with it when a newer one starts
    pages = partial(_page, api, job.id, follow=follow, run=run)
    return (yield from follow_pages(api, pages, follow, tail))


def _watch(api: Api, ref: str, project: str | None) -> Stream[Job | LogText]:
    job = yield from get(api, ref, project)
    yield Emit(job)
    reader = LogReader(api)
    pace = lists.Pace()
    while True:
        page = yield from _page(api, job.id, follow=True, run=None, tries=PATIENT)
        yield from reader.read(page, tries=PATIENT)
        seen = job
        if not job.state.settled:
            job = yield from get(api, job.id, tries=PATIENT)
            if job != seen:
                yield Emit(job)
        if page.complete and seen.state.settled:
            return
        if not (page.complete or job.state.settled):
            yield Sleep(pace.next())
        elif job == seen:
            yield Sleep(0.2)  # ended; its last lines arrive soon
