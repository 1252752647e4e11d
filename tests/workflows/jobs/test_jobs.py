"""A job runs to its end, on a cluster of its own or a given one, over the failures of its program and of ours."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from temporalio.client import WorkflowExecutionStatus

from activities import records
from heliostat.errors import Unavailable
from heliostat.models.agents import CommandKind, FactKind
from heliostat.models.clusters import ClusterState
from heliostat.models.compute_configs import ComputeConfig, WorkerNodeGroupConfig
from heliostat.models.jobs import Job, JobState, RunCause, RunState
from runtime.messages.common import Limits
from runtime.messages.jobs import start_job
from store.tables import jobs
from tests.workflows.clusters.test_healing import silent
from tests.workflows.clusters.test_start import withdraw
from tests.workflows.world import RunPlan, World
from workflows import ids, policies

SANDBOXED = True

ONE_WORKER = ComputeConfig(worker_nodes=[WorkerNodeGroupConfig(min_nodes=1)])


def runs_of(job: Job) -> list[tuple[RunState, RunCause | None]]:
    return [(r.state, r.cause) for r in job.runs]


async def test_a_job_makes_its_cluster_and_ends_it(world: World) -> None:
    job_id = await world.start_job(compute=ONE_WORKER)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.SUCCEEDED, None)]
    (run,) = job.runs
    assert run.id == f"{job_id}-1"
    assert run.exit_code == 0
    assert run.running_at is not None
    assert run.ended_at is not None
    assert run.cluster_id == job.cluster_id == ids.job_cluster_id(job_id, 1)
    cluster = await world.until_cluster(job.cluster_id, ClusterState.TERMINATED)
    assert cluster.reason == "its job SUCCEEDED"
    assert not world.alive()
    await world.until_ended(job_id)
    assert (await world.handle(job_id).describe()).status == WorkflowExecutionStatus.COMPLETED
    events = (await world.history(cluster.id)).events
    told = [e for e in events if e.HasField("signal_external_workflow_execution_initiated_event_attributes")]
    assert len(told) == 1, "a job is told that its cluster is ready; that it starts, it knows"


async def test_a_job_on_a_given_cluster_leaves_it_running(world: World) -> None:
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert job.cluster_id == cluster_id
    await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    cluster = await world.cluster(cluster_id)
    assert (cluster.state, cluster.leases) == (ClusterState.RUNNING, [])


async def test_the_head_is_given_what_was_asked_for_and_no_secret(world: World) -> None:
    cluster_id = await world.running_cluster()
    arg = world.job_input(
        cluster_id,
        entrypoint="python x.py",
        working_dir="upload:abc",
        py_modules=["upload:def"],
        requirements=["emoji==2"],
        env_vars={"TOKEN": "********"},
        timeout_s=60,
    ).model_copy(update={"env_ref": "sealed_1"})
    await world.accept_job(arg)
    world.ids.append(arg.job_id)
    await start_job(world.client, world.settings.task_queue, arg)
    await world.until_job(arg.job_id, JobState.SUCCEEDED)
    (command,) = [c for c in world.head(cluster_id).commands if c.kind == CommandKind.SUBMIT_RUN]
    assert command.args == {
        "run_id": f"{arg.job_id}-1",
        "entrypoint": "python x.py",
        "working_dir": "upload:abc",
        "py_modules": ["upload:def"],
        "requirements": ["emoji==2"],
        "env_ref": "sealed_1",
        "timeout_s": 60,
        "metadata": {"job_id": arg.job_id, "job_name": "j", "run": "1"},
    }


# --- whose failure it is --------------------------------------------------------------------------------------------


async def test_the_programs_failures_use_up_the_retries_on_the_same_cluster(world: World) -> None:
    world.fleet.run_plans = [RunPlan(exit_code=3), RunPlan(exit_code=4), RunPlan(exit_code=5)]
    job_id = await world.start_job(max_retries=2)
    job = await world.until_job(job_id, JobState.FAILED)
    assert [r.exit_code for r in job.runs] == [3, 4, 5]
    assert runs_of(job) == [(RunState.FAILED, RunCause.APPLICATION)] * 3
    assert len({r.cluster_id for r in job.runs}) == 1, "the fast path"
    assert "no retries left" in job.reason
    assert [m.kind for m in await world.story(job_id)].count("run_ended") == 3
    assert job.cluster_id is not None
    await world.until_cluster(job.cluster_id, ClusterState.TERMINATED)


async def test_a_retry_that_succeeds(world: World) -> None:
    world.fleet.run_plans = [RunPlan(exit_code=1)]
    job = await world.until_job(await world.start_job(max_retries=1), JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.APPLICATION), (RunState.SUCCEEDED, None)]


async def test_the_infrastructures_failures_never_use_up_retries(world: World) -> None:
    world.fleet.run_plans = [
        RunPlan(error="driver_lost"),
        RunPlan(error="supervisor"),
        RunPlan(exit_code=1),
        RunPlan(error="driver_lost"),
    ]
    job_id = await world.start_job(await world.running_cluster(), max_retries=1)

    async def third() -> bool:
        if "before the next attempt" in (await world.job(job_id)).waits_for:
            await world.skip(job_id, 3)
        return f"{job_id}-3" in world.fleet.started

    await world.until(third, "the run after the back-off")
    for number in (4, 5):
        await world.until_run(job_id, number)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    i, a = RunCause.INFRASTRUCTURE, RunCause.APPLICATION
    assert [r.cause for r in job.runs] == [i, i, a, i, None]


async def until_waits(world: World, job_id: str, words: str) -> None:
    async def look() -> bool:
        return words in (await world.job(job_id)).waits_for

    await world.until(look, f"{job_id} to wait for {words!r}")


async def test_an_infrastructure_that_keeps_failing_has_a_deadline(world: World) -> None:
    world.limits = Limits(infrastructure_retry_s=60)
    world.fleet.run_plan = RunPlan(error="driver_lost")
    job_id = await world.start_job(await world.running_cluster())

    async def failed() -> bool:
        if "before the next attempt" in (await world.job(job_id)).waits_for:
            await world.skip(job_id, 20)
        return (await world.job(job_id)).state == JobState.FAILED

    await world.until(failed, "the deadline")
    job = await world.job(job_id)
    assert "the infrastructure failed for" in job.reason
    assert {r.cause for r in job.runs} == {RunCause.INFRASTRUCTURE}
    assert 4 <= len(job.runs) <= 9, "back-off between them"


async def test_a_run_that_got_to_its_end_shows_that_the_infrastructure_works(world: World) -> None:
    world.fleet.run_plans = [RunPlan(error="driver_lost"), RunPlan(hold=True), RunPlan(error="driver_lost")]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id)
    run_id = await world.until_run(job_id, 2)
    await world.until_job(job_id, JobState.RUNNING)
    await world.until_quiet(job_id)
    await world.skip(job_id, 2 * 3600)
    await world.head(cluster_id).end_run(run_id, exit_code=1)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    i, a = RunCause.INFRASTRUCTURE, RunCause.APPLICATION
    assert [r.cause for r in job.runs] == [i, a, i, None]


async def test_a_runtime_environment_that_cannot_be_made_fails_at_once(world: World) -> None:
    world.fleet.run_plans = [RunPlan(exit_code=1, error="runtime_env")]
    job = await world.until_job(await world.start_job(max_retries=5), JobState.FAILED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.CONFIGURATION)]
    assert "runtime_env" in job.reason


async def test_a_timeout_counts_as_the_programs_failure(world: World) -> None:
    world.fleet.run_plans = [RunPlan(timed_out=True)]
    job = await world.until_job(await world.start_job(max_retries=1, timeout_s=7), JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.TIMEOUT), (RunState.SUCCEEDED, None)]
    assert job.runs[0].reason == "ran longer than 7 s"


async def test_a_timeout_holds_though_the_agent_says_nothing(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id, max_retries=0, timeout_s=60)
    run_id = await world.until_run(job_id)
    await world.until_job(job_id, JobState.RUNNING)
    await world.until_quiet(job_id)
    await world.skip(job_id, 100)
    assert (await world.job(job_id)).state == JobState.RUNNING, "the agent is given time to say it itself"
    await world.skip(job_id, 100)
    job = await world.until_job(job_id, JobState.FAILED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.TIMEOUT)]
    assert world.head(cluster_id).ended[run_id]["status"] == "STOPPED", "the old driver is dead"


async def test_a_run_that_somebody_stopped_on_the_cluster_ends_the_job(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id, max_retries=5)
    run_id = await world.until_run(job_id)
    await world.head(cluster_id).end_run(run_id, status="STOPPED", exit_code=None)
    job = await world.until_job(job_id, JobState.FAILED)
    assert runs_of(job) == [(RunState.STOPPED, RunCause.STOPPED)]


# --- the way to the head --------------------------------------------------------------------------------------------


async def test_a_run_that_ends_before_the_answer_to_its_submission(world: World) -> None:
    world.fleet.run_plans = [RunPlan(answer=False)]
    job = await world.until_job(await world.start_job(), JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.SUCCEEDED, None)]


async def test_a_head_that_can_not_try_yet_is_given_the_same_run_again(world: World) -> None:
    world.fleet.run_plans = [RunPlan(refuse="the disk is full", retryable=True)]
    job_id = await world.start_job(await world.running_cluster())

    async def refused() -> bool:
        return not world.fleet.run_plans

    await world.until(refused, "the refusal")
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert len(job.runs) == 1


async def test_a_head_that_refuses_is_an_infrastructure_failure(world: World) -> None:
    world.fleet.run_plans = [RunPlan(refuse="this head is fenced")]
    job = await world.until_job(await world.start_job(await world.running_cluster(), max_retries=0), JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.INFRASTRUCTURE), (RunState.SUCCEEDED, None)]
    assert "this head is fenced" in job.runs[0].reason


async def test_a_submission_without_answer_is_stopped_before_the_next_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.fleet.run_plans = [RunPlan(silent=True)]
    cluster_id = await world.running_cluster()
    with monkeypatch.context() as short:
        short.setattr(policies, "SUBMIT_TIMEOUT", timedelta(seconds=2))
        job_id = await world.start_job(cluster_id)

        async def given() -> bool:
            return not world.fleet.run_plans

        await world.until(given, "the submission that is not answered")
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.INFRASTRUCTURE), (RunState.SUCCEEDED, None)]
    kinds = [(c.kind, c.args["run_id"][-1]) for c in world.head(cluster_id).commands]
    assert kinds == [("submit_run", "1"), ("stop_run", "1"), ("submit_run", "2")]


async def test_facts_told_twice_and_late_change_nothing(world: World) -> None:
    world.fleet.run_plans = [RunPlan(exit_code=1), RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    job_id = await world.start_job(cluster_id)
    await world.until_run(job_id, 2)
    head = world.head(cluster_id)
    for _ in range(2):
        await head.tell(FactKind.RUN_ENDED, run_id=f"{job_id}-1", status="SUCCEEDED", exit_code=0)
        await head.tell(FactKind.RUN_RUNNING, run_id=f"{job_id}-1")
    await world.until_quiet(job_id)
    assert (await world.job(job_id)).state == JobState.RUNNING
    await head.end_run(f"{job_id}-2")
    await head.tell(FactKind.RUN_ENDED, run_id=f"{job_id}-2", status="FAILED", exit_code=1)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert [r.exit_code for r in job.runs] == [1, 0]


# --- the cluster under it -------------------------------------------------------------------------------------------


async def test_a_job_survives_the_loss_of_its_head(world: World) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    job_id = await world.start_job(max_retries=0)
    await world.until_run(job_id)
    cluster_id = ids.job_cluster_id(job_id, 1)
    head = await world.node(cluster_id)
    await world.kill_machine(head)
    await silent(world, cluster_id, head.id)
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.INFRASTRUCTURE), (RunState.SUCCEEDED, None)]
    assert {r.cluster_id for r in job.runs} == {cluster_id}, "the same cluster, healed"


async def test_a_cluster_that_fails_is_followed_by_a_new_one(world: World) -> None:
    world.limits = Limits(capacity_timeout_s=60, head_start_timeout_s=20, worker_start_timeout_s=20)
    world.machines.no_capacity()
    job_id = await world.start_job(max_retries=0)
    first = ids.job_cluster_id(job_id, 1)

    async def started() -> bool:
        return world.machines.calls["launch"] > 0

    await world.until(started, "the first cluster")
    await world.until_quiet(first)
    await world.skip(first, 61)
    await world.until_cluster(first, ClusterState.FAILED)
    world.machines.restock()
    job = await world.until_job(job_id, JobState.SUCCEEDED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.INFRASTRUCTURE), (RunState.SUCCEEDED, None)]
    assert [r.cluster_id for r in job.runs] == [first, ids.job_cluster_id(job_id, 2)]
    assert "no_capacity" in job.runs[0].reason
    await world.until_cluster(ids.job_cluster_id(job_id, 2), ClusterState.TERMINATED)
    assert not world.alive()


async def test_a_cluster_that_can_not_be_fails_the_job_at_once(world: World) -> None:
    world.machines.bad_config = "no such shape"
    job = await world.until_job(await world.start_job(max_retries=5), JobState.FAILED)
    assert runs_of(job) == [(RunState.FAILED, RunCause.CONFIGURATION)]
    assert "no such shape" in job.reason


@pytest.mark.parametrize("own", [True, False])
async def test_a_cluster_terminated_under_its_job_ends_the_job(world: World, own: bool) -> None:
    world.fleet.run_plans = [RunPlan(hold=True)]
    given = None if own else await world.running_cluster()
    job_id = await world.start_job(given)
    await world.until_run(job_id)
    cluster_id = given or ids.job_cluster_id(job_id, 1)
    await world.terminate(cluster_id, "I need the machines")
    job = await world.until_job(job_id, JobState.FAILED)
    assert "I need the machines" in job.reason
    assert len(job.runs) == 1
    await world.until_ended(job_id)
    await world.until_cluster(cluster_id, ClusterState.TERMINATED)


async def test_a_given_cluster_that_has_ended_fails_the_job(world: World) -> None:
    cluster_id = await world.running_cluster()
    await world.terminate(cluster_id)
    await world.until_ended(cluster_id)
    job = await world.until_job(await world.start_job(cluster_id), JobState.FAILED)
    assert "has ended" in job.reason
    job = await world.until_job(await world.start_job("cl_that_never_was"), JobState.FAILED)
    assert "cl_that_never_was" in job.reason


async def test_a_job_waits_for_a_given_cluster_that_is_starting(world: World) -> None:
    world.machines.no_capacity()
    cluster_id = await world.start_cluster()
    job_id = await world.start_job(cluster_id)
    await until_waits(world, job_id, f"cluster {cluster_id} to be ready")
    assert not (await world.job(job_id)).state.settled
    world.machines.restock()
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 60)
    await world.until_job(job_id, JobState.SUCCEEDED)


async def test_many_jobs_share_one_cluster(world: World) -> None:
    cluster_id = await world.running_cluster()
    job_ids = await asyncio.gather(*(world.start_job(cluster_id) for _ in range(8)))
    for job_id in job_ids:
        await world.until_job(job_id, JobState.SUCCEEDED)
        await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    assert (await world.cluster(cluster_id)).leases == []


# --- around it ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
async def test_a_withdrawn_acceptance_makes_nothing(world: World, given: bool) -> None:
    cluster_id = await world.running_cluster() if given else None
    launched = world.machines.calls["launch"]
    arg = world.job_input(cluster_id)
    await world.accept_job(arg)
    await withdraw(world, jobs, arg.job_id)
    await start_job(world.client, world.settings.task_queue, arg)
    assert await world.until_ended(arg.job_id) == "withdrawn"
    assert world.machines.calls["launch"] == launched
    assert not world.fleet.started
    if cluster_id is not None:
        assert not (await world.cluster(cluster_id)).leases


@dataclass
class Outage:
    """The records are away for the workflows' writes while ``now`` is true."""

    now: bool = False
    refused: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Outage:
        for module, name in ((records.cluster_records, "write_cluster"), (records.job_records, "write_job")):
            monkeypatch.setattr(module, name, self._away(getattr(module, name)))
        return self

    def _away(self, real: Any) -> Any:
        async def write(*args: Any) -> bool:
            if self.now:
                self.refused += 1
                raise Unavailable("the records are out of reach")
            wrote: bool = await real(*args)
            return wrote

        return write


@pytest.mark.long
async def test_records_that_are_away_for_a_while_lose_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage().install(monkeypatch)
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    outage.now = True
    job_id = await world.start_job(cluster_id)
    run_id = await world.until_run(job_id)
    await world.head(cluster_id).end_run(run_id)
    assert (await world.job(job_id)).state == JobState.STARTING
    before = len(await world.events_of(job_id))
    for _ in range(4):
        await world.skip(job_id, 60)
    assert outage.refused >= 4
    assert len(await world.events_of(job_id)) - before < 90, "an outage of minutes"
    outage.now = False

    async def told() -> bool:
        await world.skip(job_id, 20)
        return (await world.job(job_id)).state == JobState.SUCCEEDED

    await world.until(told, "the records to know")
    assert runs_of(await world.job(job_id)) == [(RunState.SUCCEEDED, None)]
    assert {"run_ended", "state"} <= set(await world.kinds(job_id))  # it may have ended before its start was written
    await world.until_ended(job_id)
    await world.until_quiet(cluster_id)
    await world.skip(cluster_id, 61)
    assert (await world.cluster(cluster_id)).leases == []


async def test_a_job_runs_while_the_records_are_away_and_is_shown_when_they_are_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage().install(monkeypatch)
    world.fleet.run_plans = [RunPlan(hold=True)]
    cluster_id = await world.running_cluster()
    outage.now = True
    job_id = await world.start_job(cluster_id)
    run_id = await world.until_run(job_id)

    async def refused() -> bool:
        return outage.refused >= 3

    await world.until(refused, "a write to be given up")
    outage.now = False
    await world.skip(job_id, 61)
    assert (await world.until_job(job_id, JobState.RUNNING)).runs[0].state == RunState.RUNNING
    await world.head(cluster_id).end_run(run_id)
    await world.until_job(job_id, JobState.SUCCEEDED)
