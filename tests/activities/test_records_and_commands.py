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
from clouds.boot.user_data import RAY_VERSION
from heliostat.models.agents import CommandKind
from heliostat.models.clouds import Provider
from heliostat.models.clusters import Cluster, ClusterState
from heliostat.models.common import Event, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import Job, JobConfig, JobState
from runtime.telemetry import CLUSTER_READY_SECONDS, RUNS
from store.commands import finish_command, open_commands
from store.database import Database, migrate
from store.tables import clouds, organizations
from tests.clouds.aws.test_config import GOOD as AWS

GCP = {
    "project": "acme-prod-1",
    "region": "us-central1",
    "zones": ["us-central1-a"],
    "workload_identity_provider": "projects/1/locations/global/workloadIdentityPools/pool/providers/ours",
    "service_account": "heliostat@acme-prod-1.iam.gserviceaccount.com",
    "bucket": "acme-heliostat",
}
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


@pytest.mark.parametrize("provider", [Provider.AWS, Provider.GCP, Provider.LOCAL])
async def test_a_new_node_learns_what_its_clouds_machines_run_in(db: Database, provider: Provider) -> None:
    now = utcnow()
    image = {"container_image": "rayproject/ray:2.60.0-py311"}
    config = {Provider.AWS: AWS | image, Provider.GCP: GCP | image}.get(provider)
    async with db.begin() as conn:
        await conn.execute(organizations.insert().values(id="org_1", name="default", created_at=now))
        row = {"id": "cld_1", "organization_id": "org_1", "name": "c", "is_default": True, "capabilities": {}}
        await conn.execute(clouds.insert().values(**row, provider=provider.value, config=config, created_at=now))
    records = RecordActivities(db, BootFacts(api_url="http://api", bundle_sha256="0" * 64, ca_sha256="ab" * 32))
    record = ClusterRecord(cluster=a_cluster(), node_configs={"nd_1": {}}, cloud_id="cld_1")
    boot = (await ActivityEnvironment().run(records.record_cluster, record)).boot
    assert boot is not None
    assert boot.ca_sha256 == "ab" * 32
    if provider is Provider.LOCAL:
        assert boot.environment is None
    else:
        assert boot.environment is not None
        assert (boot.environment.provider, boot.environment.container_image) == (provider, image["container_image"])
        assert boot.environment.ray_version == RAY_VERSION
    older = ClusterRecord(cluster=a_cluster())
    again = (await ActivityEnvironment().run(records.record_cluster, older)).boot
    assert again is not None
    assert again.environment is None, "no new node, nothing looked up"


def a_cluster() -> Cluster:
    now = utcnow()
    return Cluster(
        id="cl_1", name="c", project="p", cloud="fake", state=ClusterState.STARTING, compute_config=ComputeConfig(),
        created_by="ann", created_at=now, state_since=now,
    )  # fmt: skip


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
