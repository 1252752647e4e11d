from __future__ import annotations

from heliostat.models.common import utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import JobConfig
from runtime.messages.jobs import JobInput
from store.database import Database
from store.schedules import job_of_schedule
from store.tables import schedules

NOW = utcnow()


async def test_a_turn_is_the_frozen_job_with_its_own_id_and_time(db: Database, project: str) -> None:
    frozen = JobInput(
        job_id="", name="nightly", project_id=project, project="default", cloud_id="cloud_1", cloud="local",
        config=JobConfig(entrypoint="true", tags={"a": "b"}), env_ref="env_1", compute_config=ComputeConfig(),
        created_by="ada", created_at=NOW,
    )  # fmt: skip
    async with db.begin() as conn:
        await conn.execute(
            schedules.insert().values(
                id="sch_1", project_id=project, name="nightly", config={}, input=frozen.model_dump(mode="json"),
                created_by="ada", created_at=NOW, updated_at=NOW,
            )
        )  # fmt: skip
    async with db.read() as conn:
        found = await job_of_schedule(conn, "sch_1", "job_1")
        assert await job_of_schedule(conn, "none", "job_1") is None
    assert found is not None
    job, arg = found
    assert (job.id, arg.job_id, job.schedule_id, arg.env_ref) == ("job_1", "job_1", "sch_1", "env_1")
    assert (job.tags, job.created_at > NOW, arg.cluster_id) == ({"a": "b"}, True, None)
