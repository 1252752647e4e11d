"""The kernel of the entity workflows, by itself: what holds for whichever workflow it is put into."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest
from temporalio import workflow
from temporalio.client import Client
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner, Worker

from activities.records import Recorded
from workflows.entity.alarm import Alarm, Wakeup, earliest
from workflows.entity.recorder import SYSTEM, Recorder
from workflows.entity.seen import SEEN_MAX, first_sight
from workflows.entity.steps import RetryLater, Steps

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUEUE = "kernel"


def test_the_earliest_deadline_is_still_to_come() -> None:
    later, soon = NOW + timedelta(seconds=9), NOW + timedelta(seconds=3)
    assert earliest(NOW, [(later, "a"), (NOW, "passed"), (None, "not set"), (soon, "b")]) == (soon, "b")
    assert earliest(NOW, [(NOW, "passed"), (None, "not set")]) is None


def test_a_message_is_new_once() -> None:
    seen: list[str] = []
    assert first_sight(seen, "a")
    assert not first_sight(seen, "a")
    for number in range(SEEN_MAX):
        first_sight(seen, str(number))
    assert len(seen) == SEEN_MAX, "the state of a workflow has a limit"


def test_it_loads_no_cloud_sdk_and_no_other_workflow() -> None:
    code = (
        "import sys; from workflows.entity import alarm, commands, leases, life, recorder, seen, steps;"
        "print([m for m in sys.modules if m.startswith(('boto', 'google.cloud', 'google.auth', 'clouds.aws',"
        " 'clouds.gcp', 'workflows.clusters', 'workflows.jobs', 'workflows.services'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@workflow.defn
class StepsWorkflow:
    """A step that fails twice: when was it started?"""

    @workflow.run
    async def run(self, back_off: bool) -> list[float]:
        wake = Wakeup()
        recorder = Recorder("x_1", shown="")
        alarm = Alarm(wake)
        steps = Steps(recorder, wake, retry_after=(lambda n: timedelta(seconds=0.3 * (n + 1))) if back_off else None)
        began, starts = workflow.now(), list[float]()

        async def work() -> None:
            starts.append((workflow.now() - began).total_seconds())
            if len(starts) == 1:
                raise RetryLater
            if len(starts) == 2:
                raise ApplicationError("no luck")

        while len(starts) < 3 or steps.running:
            wake.clear()
            steps.raise_bug()
            steps.start("work", work)
            steps.start("work", work)  # at most one of a name
            alarm.set(steps.deadlines())
            await wake.wait()
        events = recorder.take(1).events
        assert [(e.kind, e.actor, e.message) for e in events] == [("step_failed", SYSTEM, "work: no luck")]
        return starts


@workflow.defn
class RecorderWorkflow:
    """A write that fails loses nothing, and keeps the order."""

    @workflow.run
    async def run(self) -> list[str]:
        async def fails() -> Recorded:
            raise ApplicationError("out of reach")

        async def writes() -> Recorded:
            return Recorded(wanted=True)

        recorder = Recorder("x_1", shown="A", dirty=True)
        recorder.event("one", "1")
        recorder.touch("row1")
        first = recorder.take(1)
        recorder.event("two", "2", actor="user:ann")
        recorder.touch("row2")
        assert await recorder.write(first, fails()) is None
        assert recorder.dirty
        assert recorder.held
        assert recorder.deadline() is not None
        second = recorder.take(2)
        assert await recorder.write(second, writes()) is not None
        assert not recorder.dirty
        assert not recorder.held
        return [*(f"{e.id} {e.kind} {e.actor}" for e in second.events), *second.changed]


@pytest.fixture
async def client(temporal: Client) -> AsyncIterator[Client]:
    async with Worker(
        temporal,
        task_queue=QUEUE,
        workflows=[StepsWorkflow, RecorderWorkflow],
        workflow_runner=UnsandboxedWorkflowRunner(),
        workflow_failure_exception_types=[Exception],
    ):
        yield temporal


async def test_steps_without_back_off_start_again_at_once(client: Client) -> None:
    starts = await client.execute_workflow(StepsWorkflow.run, False, id="steps-at-once", task_queue=QUEUE)
    assert starts[2] < 0.3


async def test_steps_with_back_off_wait_longer_each_time(client: Client) -> None:
    starts = await client.execute_workflow(StepsWorkflow.run, True, id="steps-back-off", task_queue=QUEUE)
    assert starts[1] - starts[0] >= 0.3
    assert starts[2] - starts[1] >= 0.6


async def test_a_failed_write_goes_along_with_the_next_one(client: Client) -> None:
    written = await client.execute_workflow(RecorderWorkflow.run, id="recorder", task_queue=QUEUE)
    assert written == [f"ev_x_1_{2:08d}_000 one system", f"ev_x_1_{2:08d}_001 two user:ann", "row1", "row2"]
