"""Accepting jobs: what is written, what is started, what a repeat gives."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from temporalio.client import Client

from heliostat.models.clusters import Cluster
from heliostat.models.common import utcnow
from heliostat.models.jobs import MASK, Job, JobState
from heliostat.models.uploads import upload_key
from runtime.messages.jobs import JobInput
from store import clusters as cluster_records
from store import encrypted_values, outbox
from store import jobs as job_records
from store.tables import accepted, followers, jobs, log_streams, sealed
from tests.api.conftest import World, opened

pytestmark = pytest.mark.timeout(60)
JOB = {"entrypoint": "python main.py"}


async def test_an_accepted_job_is_written_and_started(world: World, temporal: Client) -> None:
    body = {**JOB, "name": "train", "tags": {"team": "ml"}, "max_retries": 3, "timeout_s": 60}
    async with world.ada as http:
        answer = await http.post("/v1/jobs", json=body)
        assert answer.status_code == 201
        job = answer.json()
        assert (job["state"], job["name"], job["project"], job["created_by"]) == ("STARTING", "train", "team", "ada")
        for ref in (job["id"], "train"):
            assert (await http.get(f"/v1/jobs/{ref}")).json() == job
        events = (await http.get("/v1/jobs/train/events")).json()["items"]
    assert [(e["kind"], e["actor"]) for e in events] == [("accepted", "user:ada")]
    handle = temporal.get_workflow_handle(job["id"])
    description = await handle.describe()
    assert description.workflow_type == "JobWorkflow"
    started = (await handle.fetch_history()).events[0].workflow_execution_started_event_attributes.input
    arg = (await temporal.data_converter.decode(started.payloads, [JobInput]))[0]
    assert (arg.config.max_retries, arg.cluster_id, arg.cloud, arg.limits.head_start_timeout_s) == (
        3,
        None,
        "local",
        300,
    )


async def test_env_values_are_sealed_and_shown_to_nobody(world: World, temporal: Client) -> None:
    async with world.ada as http:
        answer = await http.post("/v1/jobs", json={**JOB, "env_vars": {"PASSWORD": "hunter2"}})
        listed = await http.get("/v1/jobs")
    job = answer.json()
    assert job["config"]["env_vars"] == {"PASSWORD": MASK}
    assert "hunter2" not in answer.text + listed.text
    row = await job_records.load_job(world.db, job["id"])
    assert row is not None
    assert row.input.env_ref is not None
    assert await encrypted_values.read_sealed(world.db, world.keys, row.input.env_ref) == {"PASSWORD": "hunter2"}
    history = await temporal.get_workflow_handle(job["id"]).fetch_history()
    assert "hunter2" not in history.to_json()
    for path in world.settings.home.glob("records.db*"):
        assert b"hunter2" not in path.read_bytes()


async def test_the_same_key_and_body_give_the_same_job(world: World) -> None:
    headers = {"idempotency-key": "k1"}
    async with world.ada as http:
        first = await http.post("/v1/jobs", json={**JOB, "tags": {"a": "1", "b": "2"}}, headers=headers)
        again = await http.post("/v1/jobs", json={"tags": {"b": "2", "a": "1"}, **JOB}, headers=headers)
        assert (first.status_code, again.status_code) == (201, 201)
        assert first.json()["id"] == again.json()["id"]
        other = await http.post("/v1/jobs", json={**JOB, "tags": {"a": "2"}}, headers=headers)
        assert (other.status_code, other.json()["code"]) == (409, "conflict")
        noun = await http.post("/v1/clusters", json={}, headers=headers)
        assert noun.status_code == 409
        fresh = await http.post("/v1/jobs", json=JOB)
        assert fresh.json()["id"] != first.json()["id"]
    async with world.admin as http:  # another project: another space of keys
        assert (await http.post("/v1/jobs", json=JOB, headers=headers)).json()["id"] != first.json()["id"]


async def test_a_key_used_by_many_at_once_gives_one_job(world: World) -> None:
    async with world.ada as http:
        answers = await asyncio.gather(
            *(http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"}) for _ in range(10))
        )
    assert {a.status_code for a in answers} == {201}
    assert len({a.json()["id"] for a in answers}) == 1
    async with world.db.read() as conn:
        assert len((await conn.execute(select(jobs.c.id))).all()) == 1


async def test_temporal_away_is_a_no_that_stays_a_no(world: World, absent: Client, temporal: Client) -> None:
    headers = {"idempotency-key": "k"}
    world.change(temporal=absent)
    async with world.ada as http:
        refused = await http.post("/v1/jobs", json={**JOB, "name": "n"}, headers=headers)
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
        assert refused.json()["remedy"]
        assert (await http.get("/v1/jobs")).json()["items"] == []
        assert (await http.get("/v1/jobs/n")).status_code == 404
        withdrawn = refused.json()["resource"]
        assert await outbox.unstarted(world.db, 0) == ([], [])
        assert not await job_records.write_job(world.db, _ended(withdrawn), [])
        world.change(temporal=temporal)
        accepted_now = await http.post("/v1/jobs", json={**JOB, "name": "n"}, headers=headers)
        assert accepted_now.status_code == 201
        assert accepted_now.json()["id"] != withdrawn


async def test_a_job_that_runs_in_spite_of_a_lost_answer_is_accepted(world: World, absent: Client) -> None:
    """The start's answer is lost, but the workflow has begun to write: taking it back would be a lie."""

    class Lost:
        async def start_workflow(self, *_: Any, id: str, **__: Any) -> None:
            row = await job_records.load_job(world.db, id)
            assert row is not None
            await job_records.write_job(world.db, row.job.model_copy(update={"revision": 1}), [])
            raise TimeoutError

    world.change(temporal=Lost())
    async with world.ada as http:
        answer = await http.post("/v1/jobs", json=JOB)
        assert answer.status_code == 201
        assert (await http.get(f"/v1/jobs/{answer.json()['id']}")).status_code == 200


async def test_a_process_that_died_before_the_start_left_a_job_that_starts(world: World, temporal: Client) -> None:
    class Died(BaseException):
        pass

    class Dying:
        async def start_workflow(self, *_: Any, **__: Any) -> None:
            raise Died

    world.change(temporal=Dying())
    async with world.ada as http:
        with pytest.raises(Died):
            await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})
    _, left = await outbox.unstarted(world.db, 0)
    assert len(left) == 1
    world.change(temporal=temporal)
    async with world.ada as http:  # the client asks again, before the monitor comes
        again = await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})
    assert (again.status_code, again.json()["id"]) == (201, left[0].id)
    assert (await temporal.get_workflow_handle(left[0].id).describe()).workflow_type == "JobWorkflow"
    assert await outbox.unstarted(world.db, 0) == ([], [])


async def test_a_repeat_that_finds_the_first_one_withdrawn_is_refused_too(world: World, temporal: Client) -> None:
    async with world.ada as http:
        job = (await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})).json()
        await world.context.tasks.wait()
        async with world.db.begin() as conn:
            await conn.execute(update(jobs).values(started=False, withdrawn=True))
        again = await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})
    assert (again.status_code, again.json().get("resource")) == (503, job["id"]), again.text


async def test_pages_and_filters(world: World) -> None:
    async with world.ada as http:
        made = []
        for n in range(7):
            tags = {"team": "ml" if n % 2 else "web", "n": str(n)}
            made.append((await http.post("/v1/jobs", json={**JOB, "name": f"j{n % 3}", "tags": tags})).json()["id"])
        seen, cursor = [], None
        while True:
            params = {"limit": 3, **({"cursor": cursor} if cursor else {})}
            page = (await http.get("/v1/jobs", params=params)).json()
            assert len(page["items"]) <= 3
            seen += [j["id"] for j in page["items"]]
            cursor = page["next_cursor"]
            if cursor is None:
                break
        assert seen == made[::-1]

        async def ids(**params: Any) -> list[str]:
            answer = await http.get("/v1/jobs", params=params)
            assert answer.status_code == 200, answer.text
            return [j["id"] for j in answer.json()["items"]]

        assert await ids(name="j0") == [made[6], made[3], made[0]]
        assert await ids(tag="team:ml") == [made[5], made[3], made[1]]
        assert await ids(tag=["team=ml", "n:1", "n:2"]) == [made[1]]
        assert await ids(state=["STARTING", "RUNNING"], project="team", limit=1) == [made[6]]
        assert await ids(state="FAILED") == []
        assert await ids(created_after=utcnow().isoformat()) == []
        assert len(await ids(created_before=utcnow().isoformat())) == 7
        assert (await http.get("/v1/jobs/j0")).json()["id"] == made[6]  # the newest of the name
        for params, field in (({"cursor": "x"}, "cursor"), ({"tag": "x"}, "tag"), ({"limit": 0}, "limit")):
            answer = await http.get("/v1/jobs", params=params)
            assert (answer.status_code, answer.json()["field"]) == (422, field)
    async with world.eve as http:
        assert (await http.get("/v1/jobs")).json()["items"] == []
        assert (await http.get("/v1/jobs", params={"project": "team"})).status_code == 404


async def test_a_job_goes_to_an_existing_cluster(world: World) -> None:
    async with world.ada as http:
        cluster = (await http.post("/v1/clusters", json={"name": "c"})).json()
        for ref in ("c", cluster["id"]):
            job = (await http.post("/v1/jobs", json={**JOB, "cluster": ref})).json()
            assert job["cluster_id"] == cluster["id"]
        assert len((await http.get("/v1/jobs", params={"cluster": "c"})).json()["items"]) == 2
        await _set_state(world, cluster["id"], "TERMINATED")
        ended = await http.post("/v1/jobs", json={**JOB, "cluster": cluster["id"]})
        assert (ended.status_code, ended.json()["field"]) == (409, "cluster")


async def test_a_waiting_job_says_what_its_cluster_waits_for(world: World) -> None:
    async with world.ada as http:
        cluster = (await http.post("/v1/clusters", json={"name": "c"})).json()
        made = (await http.post("/v1/jobs", json={**JOB, "cluster": "c"})).json()

        async def waits_for(on: str, job_waits_for: str) -> list[str]:
            starting = Cluster.model_validate({**cluster, "waits_for": on, "revision": 1})
            await cluster_records.write_cluster(world.db, starting, [], {}, [])
            job = Job.model_validate({**made, "waits_for": job_waits_for, "revision": 1})
            await job_records.write_job(world.db, job, [])
            listed = (await http.get("/v1/jobs")).json()["items"]
            return [j["waits_for"] for j in [(await http.get(f"/v1/jobs/{job.id}")).json(), *listed]]

        both = "cluster c to be ready; the cluster waits for Ray to start"
        assert await waits_for("Ray to start", "cluster c to be ready") == [both, both]
        assert await waits_for("", "cluster c to be ready") == ["cluster c to be ready"] * 2
        assert await waits_for("Ray to start", "") == ["", ""]


async def test_code_is_looked_for_in_the_bucket(world: World) -> None:
    digest = "a" * 64
    async with world.ada as http:
        body = {**JOB, "working_dir": f"upload:{digest}"}
        missing = await http.post("/v1/jobs", json=body)
        assert (missing.status_code, missing.json()["field"]) == (404, "working_dir")
        project = (await http.get("/v1/projects")).json()["items"][0]["id"]
        upload = (await http.post("/v1/uploads", json={"sha256": digest, "size": 3})).json()
        assert upload["url"].startswith("http://127.0.0.1:9/")
        world.bucket.put(upload_key(project, digest), b"zip")
        assert (await http.post("/v1/uploads", json={"sha256": digest, "size": 3})).json()["url"] is None
        assert (await http.post("/v1/jobs", json=body)).status_code == 201
    async with world.eve as http:  # knowing the digest gives nobody another project's code
        assert (await http.post("/v1/jobs", json=body)).status_code == 404


async def test_the_log_is_found_run_by_run(world: World) -> None:
    async with world.ada as http:
        job = (await http.post("/v1/jobs", json=JOB)).json()
        id = job["id"]
        empty = (await http.get(f"/v1/jobs/{id}/logs")).json()
        assert empty == {"chunks": [], "complete": False}
        async with world.db.begin() as conn:
            for number, node in ((2, "nd_b"), (1, "nd_a")):
                stream = f"runs/{id}-{number}.log"
                await conn.execute(
                    log_streams.insert().values(
                        cluster_id="cl_1",
                        node_id=node,
                        stream=stream,
                        job_id=id,
                        complete=number == 1,
                        created_at=utcnow(),
                    )
                )
                for offset, data in ((0, b"0123456789"), (10, b"abc")):
                    world.bucket.put(f"logs/cl_1/{node}/{stream}/{offset:020d}", data)
        page = (await http.get(f"/v1/jobs/{id}/logs", params={"follow": True})).json()
        assert [(c["run_id"], c["offset"], c["size"]) for c in page["chunks"]] == [
            (f"{id}-1", 0, 10), (f"{id}-1", 10, 3), (f"{id}-2", 0, 10), (f"{id}-2", 10, 3),
        ]  # fmt: skip
        for run in ("2", f"{id}-2"):
            chunks = (await http.get(f"/v1/jobs/{id}/logs", params={"run": run})).json()["chunks"]
            assert {c["run_id"] for c in chunks} == {f"{id}-2"}
        # Settled is not enough: run 2's node has more to ship.
        await job_records.write_job(world.db, _ended(id, cluster_id="cl_1"), [])
        assert (await http.get(f"/v1/jobs/{id}/logs")).json()["complete"] is False
        async with world.db.begin() as conn:
            await conn.execute(update(log_streams).values(complete=True))
        assert (await http.get(f"/v1/jobs/{id}/logs")).json()["complete"] is True


async def test_a_reader_that_follows_is_noted(world: World) -> None:
    async with world.ada as http:
        cluster = (await http.post("/v1/clusters", json={"name": "c"})).json()
        job = (await http.post("/v1/jobs", json={**JOB, "cluster": "c"})).json()
        await http.get(f"/v1/jobs/{job['id']}/logs")
        async with world.db.read() as conn:
            assert (await conn.execute(select(followers))).all() == []
        before = utcnow()
        for _ in range(3):
            await http.get(f"/v1/jobs/{job['id']}/logs", params={"follow": True})
        async with world.db.read() as conn:
            row = (await conn.execute(select(followers))).one()
    assert row.cluster_id == cluster["id"]
    assert before <= row.until - timedelta(seconds=10) <= utcnow()


async def test_what_was_accepted_is_there_after_the_process(settings: Any, temporal: Client) -> None:
    async with opened(settings, temporal) as first:
        async with first.admin as http:
            job = (await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})).json()
        token = first.admin_token
    async with opened(settings, temporal) as second:
        async with second.client(token) as http:
            assert (await http.get(f"/v1/jobs/{job['id']}")).json() == job
            again = await http.post("/v1/jobs", json=JOB, headers={"idempotency-key": "k"})
            assert again.json()["id"] == job["id"]


async def test_two_apis_on_one_file_are_refused(world: World, temporal: Client) -> None:
    from heliostat.errors import Conflict, InvalidRequest

    with pytest.raises(Conflict, match="Another API process"):
        async with opened(world.settings, temporal):
            pass
    with pytest.raises(InvalidRequest, match="SQLite"):
        async with opened(world.settings.model_copy(update={"api_processes": 2}), temporal):
            pass


async def test_the_records_hold_nothing_readable_of_a_body_under_a_key(world: World) -> None:
    async with world.ada as http:
        await http.post("/v1/jobs", json={**JOB, "env_vars": {"A": "b"}}, headers={"idempotency-key": "k"})
    async with world.db.read() as conn:
        digest = await conn.scalar(select(accepted.c.body_sha256))
        assert len(digest) == 64
        assert len((await conn.execute(select(sealed))).all()) == 1


def _ended(id: str, cluster_id: str | None = None) -> Job:
    now = utcnow()
    return Job(
        id=id, name="n", project="team", state=JobState.FAILED, config=JOB, created_by="ada", created_at=now,
        state_since=now, ended_at=now, revision=9, cluster_id=cluster_id,
    )  # fmt: skip


async def _set_state(world: World, cluster_id: str, state: str) -> None:
    row = await cluster_records.load_cluster(world.db, cluster_id)
    assert row is not None
    update = {"state": state, "revision": row.revision + 1, "ended_at": utcnow()}
    await cluster_records.write_cluster(
        world.db, row.cluster.model_validate(row.cluster.model_dump() | update), [], {}, []
    )
