"""Schedules: the row and Temporal's schedule are one thing, also when either is lost."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import delete, select
from temporalio.client import Client, ScheduleOverlapPolicy
from temporalio.service import RPCError

from api.schedules.cron import parse
from api.schedules.routes import reconcile_all
from heliostat.models.common import new_id, utcnow
from heliostat.models.jobs import MASK
from store import clusters as cluster_records
from store import encrypted_values
from store import jobs as job_records
from store.database import READERS
from store.schedules import job_of_schedule
from store.tables import schedules
from tests.api.conftest import World

pytestmark = pytest.mark.timeout(60)
NIGHTLY = {
    "cron_expression": "30 2 * * mon-fri",
    "timezone": "Europe/Berlin",
    "overlap_policy": "BUFFER_ONE",
    "catchup_window_s": 60,
    "job_config": {"entrypoint": "true", "env_vars": {"PASSWORD": "hunter2"}, "tags": {"a": "b"}},
}


async def test_apply_makes_and_changes_one_schedule(world: World, temporal: Client) -> None:
    async with world.ada as http:
        answer = await http.put("/v1/schedules/nightly", json=NIGHTLY)
        assert answer.status_code == 200
        made = answer.json()
        assert (made["name"], made["state"], made["project"]) == ("nightly", "ENABLED", "team")
        assert made["config"]["job_config"]["env_vars"] == {"PASSWORD": MASK}
        assert datetime.fromisoformat(made["next_trigger_at"]) > utcnow()
        changed = await http.put("/v1/schedules/nightly", json={**NIGHTLY, "cron_expression": "@hourly"})
        assert changed.json()["id"] == made["id"]
        assert changed.json()["created_at"] == made["created_at"]
        assert (await http.get("/v1/schedules/nightly")).json()["config"]["cron_expression"] == "@hourly"
        assert [s["id"] for s in (await http.get("/v1/schedules")).json()["items"]] == [made["id"]]
    found = await temporal.get_schedule_handle(made["id"]).describe()
    assert found.schedule.policy.overlap == ScheduleOverlapPolicy.BUFFER_ONE
    assert found.schedule.policy.catchup_window.total_seconds() == 60
    assert found.schedule.spec.time_zone_name == "Europe/Berlin"
    assert found.schedule.action.workflow == "ScheduledRunWorkflow"  # type: ignore[union-attr]
    assert "hunter2" not in repr(found.raw_description)


async def test_a_turns_job_is_what_was_applied(world: World) -> None:
    async with world.ada as http:
        id = (await http.put("/v1/schedules/nightly", json=NIGHTLY)).json()["id"]
    async with world.db.read() as conn:
        found = await job_of_schedule(conn, id, "job_x")
        assert await job_of_schedule(conn, "none", "job_x") is None
    assert found is not None
    job, arg = found
    assert (job.id, job.name, job.schedule_id, job.tags, arg.job_id) == ("job_x", "nightly", id, {"a": "b"}, "job_x")
    assert (await encrypted_values.read_sealed(world.db, world.keys, arg.env_ref or "")) == {"PASSWORD": "hunter2"}


async def test_many_runs_at_once_do_not_wait_for_each_others_connections(world: World) -> None:
    """A request that takes a second connection while it holds one would block all readers: the pool has few."""
    async with world.ada as http:
        assert (await http.put("/v1/schedules/nightly", json=NIGHTLY)).is_success
        async with asyncio.timeout(20):
            answers = await asyncio.gather(*(http.post("/v1/schedules/nightly/run") for _ in range(3 * READERS)))
        assert {a.status_code for a in answers} == {201}, [a.text for a in answers]
        assert len({a.json()["id"] for a in answers}) == 3 * READERS


async def test_pause_resume_run_delete(world: World, temporal: Client) -> None:
    async with world.ada as http:
        id = (await http.put("/v1/schedules/nightly", json=NIGHTLY)).json()["id"]
        paused = (await http.post("/v1/schedules/nightly/pause")).json()
        assert (paused["state"], paused["next_trigger_at"]) == ("DISABLED", None)
        assert (await temporal.get_schedule_handle(id).describe()).schedule.state.paused
        again = (await http.put("/v1/schedules/nightly", json=NIGHTLY)).json()
        assert again["state"] == "DISABLED"  # applying anew does not wake it
        resumed = (await http.post(f"/v1/schedules/{id}/resume")).json()
        assert (resumed["state"], resumed["next_trigger_at"] is not None) == ("ENABLED", True)
        headers = {"idempotency-key": "k"}
        job = (await http.post("/v1/schedules/nightly/run", headers=headers)).json()
        assert (job["schedule_id"], job["name"], job["created_by"]) == (id, "nightly", "ada")
        assert (await http.post("/v1/schedules/nightly/run", headers=headers)).json()["id"] == job["id"]
        assert (await http.get("/v1/schedules/nightly")).json()["last_jobs"] == [job["id"]]
        assert [j["id"] for j in (await http.get("/v1/jobs", params={"schedule": id})).json()["items"]] == [job["id"]]
        row = await job_records.load_job(world.db, job["id"])
        assert row is not None
        assert await encrypted_values.read_sealed(world.db, world.keys, row.input.env_ref or "") == {
            "PASSWORD": "hunter2"
        }
        assert (await http.delete("/v1/schedules/nightly")).status_code == 204
        assert (await http.get(f"/v1/schedules/{id}")).status_code == 404
        assert (await http.get(f"/v1/jobs/{job['id']}")).status_code == 200
    with pytest.raises(RPCError, match="not found"):
        await temporal.get_schedule_handle(id).describe()


async def test_what_temporal_lost_is_made_again(world: World, temporal: Client) -> None:
    async with world.ada as http:
        id = (await http.put("/v1/schedules/nightly", json=NIGHTLY)).json()["id"]
        await temporal.get_schedule_handle(id).delete()
        assert (await http.get("/v1/schedules/nightly")).json()["next_trigger_at"] is None
        await reconcile_all(world.context)
        assert (await http.get("/v1/schedules/nightly")).json()["next_trigger_at"] is not None
        await temporal.get_schedule_handle(id).delete()
        assert (await http.post("/v1/schedules/nightly/pause")).status_code == 200
        assert (await temporal.get_schedule_handle(id).describe()).schedule.state.paused
        await temporal.get_schedule_handle(id).delete()
        assert (await http.delete("/v1/schedules/nightly")).status_code == 204


async def test_what_the_records_lost_is_taken_over_by_the_next_apply(world: World, temporal: Client) -> None:
    async with world.ada as http:
        id = (await http.put("/v1/schedules/nightly", json=NIGHTLY)).json()["id"]
        async with world.db.begin() as conn:
            await conn.execute(delete(schedules))
        again = (await http.put("/v1/schedules/nightly", json={**NIGHTLY, "cron_expression": "@daily"})).json()
        assert again["id"] == id
    found = [s async for s in await temporal.list_schedules() if s.id == id]
    assert len(found) <= 1


async def test_a_refused_schedule_leaves_nothing_and_a_refused_change_the_old_one(
    world: World, absent: Client, temporal: Client
) -> None:
    async with world.ada as http:
        world.change(temporal=absent)
        assert (await http.put("/v1/schedules/s", json=NIGHTLY)).status_code == 503
        assert (await http.get("/v1/schedules")).json()["items"] == []
        world.change(temporal=temporal)
        assert (await http.put("/v1/schedules/s", json=NIGHTLY)).status_code == 200
        world.change(temporal=absent)
        assert (await http.delete("/v1/schedules/s")).status_code == 503
        shown = (await http.get("/v1/schedules/s")).json()
        assert (shown["next_trigger_at"], shown["state"]) == (None, "ENABLED")
    async with world.db.read() as conn:
        assert len((await conn.execute(select(schedules))).all()) == 1


async def test_a_schedule_finds_the_cluster_of_that_name_that_lives_now(world: World) -> None:
    async with world.ada as http:
        first = (await http.post("/v1/clusters", json={"name": "c"})).json()["id"]
        on_it = {**NIGHTLY, "job_config": {"entrypoint": "true", "cluster": "c"}}
        id = (await http.put("/v1/schedules/s", json=on_it)).json()["id"]
        await _end(world, first)
        assert await _cluster_of(world, id) == first  # its job says that this one has ended
        second = (await http.post("/v1/clusters", json={"name": "c"})).json()["id"]
        assert await _cluster_of(world, id) == second
        await _end(world, second)
        refused = await http.post("/v1/schedules/s/run")
        assert (refused.status_code, refused.json()["field"]) == (409, "cluster")


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("30 2 * * MON-FRI", ["30 2 * * mon-fri"]),
        ("*/5  0-6/2 1,15 jan *", ["*/5 0-6/2 1,15 jan *"]),
        ("0 0 13 * 5", ["0 0 13 * *", "0 0 * * 5"]),  # cron: the 13th, and Fridays; Temporal alone: Friday the 13th
        ("0 0 */2 * 5", ["0 0 */2 * 5"]),
        ("0 0 30 2 sun", ["0 0 30 2 *", "0 0 * 2 sun"]),
        ("@daily", ["@daily"]),
        ("@every 90s", ["@every 90s"]),
    ],
)
def test_cron_means_what_cron_means(expression: str, wanted: list[str]) -> None:
    assert parse(expression) == wanted


async def test_temporal_takes_every_cron_that_we_take(world: World) -> None:
    async with world.ada as http:
        for n, cron in enumerate(("0/5 * * * *", "0 0 13 * 5", "0 0 * * 7", "@weekly", "@every 1h30m", "0 0 29 2 *")):
            answer = await http.put(f"/v1/schedules/s{n}", json={**NIGHTLY, "cron_expression": cron})
            assert answer.json()["next_trigger_at"], (cron, answer.text)


async def _cluster_of(world: World, schedule_id: str) -> Any:
    async with world.db.read() as conn:
        found = await job_of_schedule(conn, schedule_id, new_id("job"))
    assert found is not None
    return found[1].cluster_id


async def _end(world: World, id: str) -> None:
    row = await cluster_records.load_cluster(world.db, id)
    assert row is not None
    more = {"state": "TERMINATED", "ended_at": utcnow(), "revision": row.revision + 1}
    ended = row.cluster.model_validate(row.cluster.model_dump() | more)
    await cluster_records.write_cluster(world.db, ended, [], {}, [])
