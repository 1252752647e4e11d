from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from heliostat.models.clusters import Cluster, ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import Event, utcnow
from heliostat.models.compute_configs import ComputeConfig
from heliostat.models.jobs import Job, JobConfig, JobState
from runtime.keys import Keys
from runtime.messages.clusters import ClusterInput
from runtime.messages.jobs import JobInput
from store import clusters as cluster_records
from store import encrypted_values, heartbeats, outbox, retention
from store import jobs as job_records
from store import revisions as projection
from store.acceptance import mark_started
from store.commands import open_commands, put_command
from store.database import Database
from store.tables import clusters, events, hearing, jobs, log_streams, nodes, reports, sealed

NOW = utcnow()


def a_cluster(
    id: str = "clu_1", *, name: str = "c", state: ClusterState = ClusterState.STARTING, revision: int = 0
) -> Cluster:
    return Cluster(
        id=id, name=name, project="default", cloud="local", state=state, compute_config=ComputeConfig(),
        created_by="ada", created_at=NOW, state_since=NOW, revision=revision,
        ended_at=NOW if state.settled else None,
    )  # fmt: skip


def a_job(id: str = "job_1", *, state: JobState = JobState.STARTING, revision: int = 0) -> Job:
    return Job(
        id=id, name="j", project="default", state=state, config=JobConfig(entrypoint="true"), created_by="ada",
        created_at=NOW, state_since=NOW, revision=revision, ended_at=NOW if state.settled else None,
    )  # fmt: skip


def a_node(
    id: str = "node_1", *, cluster: str = "clu_1", state: NodeState = NodeState.RUNNING, generation: int = 1
) -> Node:
    return Node(
        id=id, cluster_id=cluster, role=NodeRole.HEAD, group="head", slot=0, generation=generation, state=state,
        created_at=NOW, ended_at=NOW if state is NodeState.TERMINATED else None,
    )  # fmt: skip


def an_event(id: str, resource: str = "clu_1") -> Event:
    return Event(id=id, resource_id=resource, at=NOW, kind="k", actor="user:ada", message="m")


async def put_cluster(db: Database, project: str, cluster: Cluster) -> bool:
    arg = ClusterInput(
        cluster_id=cluster.id, name=cluster.name, project_id=project, project="default", cloud_id="cloud_1",
        cloud="local", config=cluster.compute_config, created_by="ada", created_at=NOW,
    )  # fmt: skip
    async with db.begin() as conn:
        return await cluster_records.insert_cluster(conn, cluster, arg)


async def put_job(db: Database, project: str, job: Job, env_ref: str | None = None) -> bool:
    arg = JobInput(
        job_id=job.id, name=job.name, project_id=project, project="default", cloud_id="cloud_1", cloud="local",
        config=job.config, env_ref=env_ref, compute_config=ComputeConfig(), created_by="ada", created_at=NOW,
    )  # fmt: skip
    async with db.begin() as conn:
        return await job_records.insert_job(conn, job, arg)


async def test_a_late_write_changes_nothing_and_a_repeat_is_no_harm(db: Database, project: str) -> None:
    assert await put_cluster(db, project, a_cluster())
    running = a_cluster(state=ClusterState.RUNNING, revision=2)
    for _ in range(2):
        assert await cluster_records.write_cluster(
            db, running, [a_node()], {"node_1": {"name": "head"}}, [an_event("e2")]
        )
    late = a_cluster(state=ClusterState.STARTING, revision=1)
    assert await cluster_records.write_cluster(db, late, [a_node(state=NodeState.REQUESTED)], {}, [an_event("e1")])
    row = await cluster_records.load_cluster(db, "clu_1")
    assert row is not None
    assert row.cluster == running
    assert row.input.cluster_id == "clu_1"
    assert [n.state for n in await cluster_records.load_nodes(db, "clu_1")] == [NodeState.RUNNING]
    async with db.read() as conn:
        assert sorted(await conn.scalars(select(events.c.id))) == ["e1", "e2"]
        assert await conn.scalar(select(nodes.c.config)) == {"name": "head"}


async def test_a_node_keeps_its_token_and_config(db: Database, project: str) -> None:
    await put_cluster(db, project, a_cluster())
    await cluster_records.write_cluster(db, a_cluster(revision=1), [a_node()], {"node_1": {"name": "head"}}, [])
    async with db.begin() as conn:
        await conn.execute(update(nodes).values(token_sha256="x", authenticated=True))
    await cluster_records.write_cluster(db, a_cluster(revision=2), [a_node(state=NodeState.LOST)], {}, [])
    async with db.read() as conn:
        row = (await conn.execute(select(nodes))).one()
    assert (row.token_sha256, row.authenticated, row.config, row.state) == ("x", True, {"name": "head"}, "LOST")


async def test_an_ended_nodes_commands_are_closed(db: Database, project: str) -> None:
    await put_cluster(db, project, a_cluster())
    await cluster_records.write_cluster(db, a_cluster(revision=1), [a_node()], {}, [])
    await put_command(db, "c1", "clu_1", "node_1", "fence", {}, b"t")
    await cluster_records.write_cluster(db, a_cluster(revision=2), [a_node(state=NodeState.TERMINATING)], {}, [])
    assert len(await open_commands(db, ["node_1"])) == 1
    await cluster_records.write_cluster(db, a_cluster(revision=3), [a_node(state=NodeState.TERMINATED)], {}, [])
    assert await open_commands(db, ["node_1"]) == []
    late = await put_command(db, "c2", "clu_1", "node_1", "stop_run", {}, b"t")
    assert late is not None
    assert (late["ok"], late["error"]) == (False, "its node has ended")
    assert await open_commands(db, ["node_1"]) == []


async def test_an_ended_cluster_frees_its_name(db: Database, project: str) -> None:
    assert await put_cluster(db, project, a_cluster())
    assert not await put_cluster(db, project, a_cluster("clu_2"))
    await cluster_records.write_cluster(db, a_cluster(state=ClusterState.TERMINATED, revision=1), [], {}, [])
    assert await put_cluster(db, project, a_cluster("clu_2"))


async def test_withdrawn_and_unknown_rows_take_no_writes(db: Database, project: str) -> None:
    await put_cluster(db, project, a_cluster())
    await put_job(db, project, a_job())
    async with db.begin() as conn:
        await conn.execute(update(clusters).values(withdrawn=True))
        await conn.execute(update(jobs).values(withdrawn=True))
    assert not await cluster_records.write_cluster(db, a_cluster(revision=1), [a_node()], {}, [an_event("e")])
    assert not await job_records.write_job(db, a_job(revision=1), [an_event("e")])
    assert not await cluster_records.write_cluster(db, a_cluster("none"), [], {}, [])
    assert not await job_records.write_job(db, a_job("none"), [])
    assert await outbox.is_cancelled(db, "cluster", "clu_1")
    assert await outbox.is_cancelled(db, "job", "none")
    assert await outbox.unstarted(db, 0) == ([], [])
    async with db.read() as conn:
        assert (await conn.execute(select(events))).all() == []
        assert (await conn.execute(select(nodes))).all() == []


async def test_unstarted_are_found_with_their_input_until_they_are_marked(db: Database, project: str) -> None:
    await put_cluster(db, project, a_cluster())
    await put_job(db, project, a_job(), env_ref="env_1")
    assert await outbox.unstarted(db, 3600) == ([], [])
    found_clusters, found_jobs = await outbox.unstarted(db, 0)
    assert [c.input.cluster_id for c in found_clusters] == ["clu_1"]
    assert [(j.input.job_id, j.input.env_ref) for j in found_jobs] == [("job_1", "env_1")]
    async with db.begin() as conn:
        await mark_started(conn, ["clu_1", "job_1"])
    assert await outbox.unstarted(db, 0) == ([], [])


async def test_concurrent_writes_end_at_the_highest_revision(db: Database, project: str) -> None:
    await put_job(db, project, a_job())
    await asyncio.gather(
        *(job_records.write_job(db, a_job(revision=n), [an_event(f"e{n}", "job_1")]) for n in range(1, 9))
    )
    row = await job_records.load_job(db, "job_1")
    assert row is not None
    assert row.revision == row.job.revision == 8


async def test_env_values_are_sealed(db: Database, project: str) -> None:
    keys = Keys(b"k" * 32)
    async with db.begin() as conn:
        await encrypted_values.write_sealed(conn, keys, "env_1", project, {"A": "hunter2"})
        await encrypted_values.write_sealed(conn, keys, "env_1", project, {"A": "other"})
    async with db.read() as conn:
        assert b"hunter2" not in await conn.scalar(select(sealed.c.ciphertext))
    assert await encrypted_values.read_sealed(db, keys, "env_1") == {"A": "hunter2"}
    assert await encrypted_values.read_sealed(db, keys, "none") is None


async def hear(db: Database, since: float, last: float = 0) -> None:
    async with db.begin() as conn:
        await conn.execute(hearing.delete())
        await conn.execute(
            hearing.insert().values(id=1, since=NOW - timedelta(seconds=since), last=NOW - timedelta(seconds=last))
        )


async def running_head(
    db: Database, project: str, n: int, *, heard: float, state: ClusterState = ClusterState.RUNNING
) -> None:
    cluster, node = f"clu_{n}", f"node_{n}"
    await put_cluster(db, project, a_cluster(cluster, name=cluster))
    await cluster_records.write_cluster(
        db, a_cluster(cluster, name=cluster, state=state, revision=1), [a_node(node, cluster=cluster)], {}, []
    )
    async with db.begin() as conn:
        await conn.execute(
            reports.insert().values(
                node_id=node,
                cluster_id=cluster,
                is_head=True,
                seq=1,
                activity="busy",
                doc={},
                at=NOW - timedelta(seconds=heard),
            )
        )


async def test_only_heads_not_heard_while_we_could_hear_are_silent(db: Database, project: str) -> None:
    await running_head(db, project, 1, heard=1)
    await running_head(db, project, 2, heard=60)
    await running_head(db, project, 3, heard=60, state=ClusterState.TERMINATING)
    await hear(db, since=3600)
    found = await heartbeats.silent_heads(db, NOW, 20)
    assert found.total == 2
    assert found.silent == [("clu_2", "node_2", NOW - timedelta(seconds=60))]
    assert found.heard_since == NOW - timedelta(seconds=3600)


async def test_silence_counts_from_when_we_began_to_hear(db: Database, project: str) -> None:
    await running_head(db, project, 1, heard=600)
    await hear(db, since=10)
    assert (await heartbeats.silent_heads(db, NOW, 20)).silent == []
    await hear(db, since=30)
    assert (await heartbeats.silent_heads(db, NOW, 20)).silent == [("clu_1", "node_1", NOW - timedelta(seconds=30))]


@pytest.mark.parametrize("last", [6.0, None])
async def test_nobody_is_silent_while_we_can_not_hear(db: Database, project: str, last: float | None) -> None:
    await running_head(db, project, 1, heard=600)
    if last is not None:
        await hear(db, since=3600, last=last)
    assert await heartbeats.silent_heads(db, NOW, 20) == heartbeats.SilentHeads(None, 1, [])


async def test_a_replaced_head_is_not_silent(db: Database, project: str) -> None:
    await running_head(db, project, 1, heard=600)
    newer = a_node("node_1b", generation=2)
    await cluster_records.write_cluster(
        db, a_cluster(name="clu_1", state=ClusterState.RUNNING, revision=2), [newer], {}, []
    )
    async with db.begin() as conn:
        await conn.execute(
            reports.insert().values(
                node_id="node_1b", cluster_id="clu_1", is_head=True, seq=1, activity="busy", doc={}, at=NOW
            )
        )
    await hear(db, since=3600)
    assert (await heartbeats.silent_heads(db, NOW, 20)).silent == []


async def test_a_launched_head_that_never_reported_is_unheard(db: Database, project: str) -> None:
    """Its machine may have died before its agent said a word; only heads, only while we could hear."""
    made = NOW - timedelta(seconds=60)
    await put_cluster(db, project, a_cluster(name="clu_1"))
    starting = a_cluster(name="clu_1", state=ClusterState.STARTING, revision=1)
    head = a_node(state=NodeState.LAUNCHED).model_copy(update={"created_at": made})
    await cluster_records.write_cluster(db, starting, [head], {}, [])
    await hear(db, since=3600)
    assert await heartbeats.heads_never_heard(db, NOW, 20) == [("clu_1", "node_1", made)]
    assert await heartbeats.heads_never_heard(db, NOW, 90) == []
    assert (await heartbeats.silent_heads(db, NOW, 20)).silent == [], "it never ran"
    await hear(db, since=10)
    assert await heartbeats.heads_never_heard(db, NOW, 20) == []


async def test_retention_forgets_what_has_ended_and_nothing_else(db: Database, project: str) -> None:
    keys = Keys(b"k" * 32)
    await put_cluster(db, project, a_cluster())
    await put_cluster(db, project, a_cluster("clu_2", name="lives"))
    ended = a_cluster(state=ClusterState.TERMINATED, revision=1)
    await cluster_records.write_cluster(db, ended, [a_node(state=NodeState.TERMINATED)], {}, [an_event("e1")])
    await put_job(db, project, a_job(), env_ref="env_1")
    await put_job(db, project, a_job("job_2"), env_ref="env_2")
    await job_records.write_job(db, a_job(state=JobState.SUCCEEDED, revision=1), [])
    await projection.add_events(db, [an_event("e2", "clu_2")])
    async with db.begin() as conn:
        await encrypted_values.write_sealed(conn, keys, "env_1", project, {"A": "1"})
        await encrypted_values.write_sealed(conn, keys, "env_2", project, {"A": "2"})
        await conn.execute(
            log_streams.insert().values(cluster_id="clu_1", node_id="node_1", stream="runs/x.log", created_at=NOW)
        )
    later, earlier = NOW + timedelta(days=1), NOW - timedelta(days=1)
    assert await retention.logs_before(db, earlier) == []
    assert await retention.logs_before(db, later) == [("cloud_1", "clu_1")]
    await retention.forget_logs(db, ["clu_1"])
    assert await retention.logs_before(db, later) == []
    assert not any((await retention.delete_old(db, records_before=earlier, events_before=earlier)).values())
    counts = await retention.delete_old(db, records_before=later, events_before=earlier)
    assert (counts["clusters"], counts["jobs"], counts["nodes"], counts["events"]) == (1, 1, 1, 1)
    counts = await retention.delete_old(db, records_before=later, events_before=later)
    assert (counts["sealed"], counts["events"]) == (1, 1)
    assert await cluster_records.load_cluster(db, "clu_2") is not None
    assert await encrypted_values.read_sealed(db, keys, "env_2") == {"A": "2"}


async def test_uploads_of_living_jobs_are_in_use(db: Database, project: str) -> None:
    for id, ended in (("job_1", False), ("job_2", True)):
        job = a_job(id)
        job.config.working_dir, job.config.py_modules = f"upload:{id}-dir", [f"upload:{id}-mod", "https://x/y.zip"]
        await put_job(db, project, job)
        if ended:
            await job_records.write_job(db, job.model_copy(update={"ended_at": NOW, "state": JobState.FAILED}), [])
    assert await retention.uploads_in_use(db) == {"job_1-dir", "job_1-mod"}
