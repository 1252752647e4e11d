"""What workflows write down, and the commands that wait for an agent's answer, on real records."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.activity import _CompleteAsyncError
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment

from activities.commands import CommandActivities, CommandRequest
from activities.nodes import BootFacts
from activities.records import ClusterRecord, JobRecord, RecordActivities
from heliostat.models.agents import CommandKind
from heliostat.models.clusters import Cluster, ClusterState
from heliostat.models.common import Event, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import Job, JobConfig, JobState
from runtime.telemetry import CLUSTER_READY_SECONDS, RUNS
from store.commands import finish_command, open_commands
from store.database import Database, migrate

COMMAND = CommandRequest(
    id="run-1-submit_run", cluster_id="cl_1", node_id="nd_1", kind=CommandKind.SUBMIT_RUN, args={"run_id": "run-1"}
)


@pytest.fixture
async def db(tmp_path: Path) -> AsyncIterator[Database]:
    url = f"sqlite+aiosqlite:///{tmp_path / 'records.db'}"
    await migrate(url)
    database = Database(url)
    yield database
    await database.dispose()


async def give(db: Database) -> dict[str, object]:
    answer: dict[str, object] = await ActivityEnvironment().run(CommandActivities(db).run_command, COMMAND)
    return answer


def result(ok: bool, error: str = "", retryable: bool = False) -> dict[str, object]:
    return {"ok": ok, "result": {"accepted": True} if ok else {}, "error": error, "retryable": retryable}


async def test_a_command_waits_open_until_it_is_answered_and_is_given_once(db: Database) -> None:
    for _ in range(3):  # an activity that is tried again gives no second command
        with pytest.raises(_CompleteAsyncError):
            await give(db)
    assert [c.id for c in await open_commands(db, ["nd_1"])] == [COMMAND.id]
    await finish_command(db, COMMAND.id, "nd_1", result(True))
    assert await open_commands(db, ["nd_1"]) == []
    assert await give(db) == {"accepted": True}, "the answer was written down before anybody waited for it again"


async def test_a_refusal_is_final_and_a_could_not_try_is_opened_again(db: Database) -> None:
    with pytest.raises(_CompleteAsyncError):
        await give(db)
    await finish_command(db, COMMAND.id, "nd_1", result(False, "the disk is full", retryable=True))
    with pytest.raises(_CompleteAsyncError):
        await give(db)
    assert [c.id for c in await open_commands(db, ["nd_1"])] == [COMMAND.id]
    await finish_command(db, COMMAND.id, "nd_1", result(False, "this head is fenced"))
    with pytest.raises(ApplicationError, match="this head is fenced") as failure:
        await give(db)
    assert (failure.value.type, failure.value.non_retryable) == ("command_failed", True)


async def test_rows_that_do_not_exist_are_not_wanted(db: Database) -> None:
    now = utcnow()
    records = RecordActivities(db, BootFacts(api_url="http://api", bundle_sha256="0" * 64))
    cluster = Cluster(
        id="cl_1", name="c", project="p", cloud="fake-metrics", state=ClusterState.RUNNING,
        compute_config=ComputeConfig(), created_by="ann", created_at=now, state_since=now,
        phase_seconds={"head_ready": 5.0, "workers_ready": 3.0},
    )  # fmt: skip
    ready = Event(id="ev_1", resource_id="cl_1", at=now, kind="cluster_ready", actor="cl_1", message="")
    answer = await ActivityEnvironment().run(records.record_cluster, ClusterRecord(cluster=cluster, events=[ready]))
    assert not answer.wanted
    assert answer.boot is not None
    assert answer.boot.api_url == "http://api"
    assert CLUSTER_READY_SECONDS.labels(cloud="fake-metrics")._sum.get() == 8.0
    job = Job(
        id="job_1", name="j", project="p", state=JobState.STARTING, config=JobConfig(entrypoint="x"),
        created_by="ann", created_at=now, state_since=now,
    )  # fmt: skip
    before = RUNS.labels(state="SUCCEEDED", cause="")._value.get()
    assert not (await ActivityEnvironment().run(records.record_job, JobRecord(job=job))).wanted
    assert RUNS.labels(state="SUCCEEDED", cause="")._value.get() == before
