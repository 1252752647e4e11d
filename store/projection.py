"""What workflows own, written down for lists and history: rows of clusters, nodes, jobs and their events.

A write carries its workflow's revision: a smaller one than the row's changes nothing (a late write never
undoes a newer one), an equal one is a repeat. Every write is one transaction. A row that was withdrawn
(refused after all) takes no writes: the workflow is told by False and does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, Table, Update, and_, bindparam, func, null, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.clusters import Cluster, ClusterState, Node, NodeRole, NodeState
from heliostat.models.common import Event, utcnow
from heliostat.models.jobs import Job
from runtime.keys import Keys
from runtime.messages import ClusterInput, JobInput
from store.commands import close_commands
from store.database import Database, insert, insert_new
from store.tables import clusters, events, hearing, jobs, nodes, reports, sealed, services

HEARING_GAP_S = 5.0
"""The API notes every second or so that it can hear. Not noted for so long: it can't, silence counts for nothing."""


def newer(table: Table) -> Update:
    """Of a row that takes writes, by one that is not older. Built once: these are the hottest statements."""
    c = table.c
    return update(table).where(
        c.id == bindparam("its_id"), c.revision <= bindparam("its_revision"), c.withdrawn.is_(False)
    )


_UPDATE_JOB = newer(jobs)
_UPDATE_CLUSTER = newer(clusters)
_END_CLUSTER = _UPDATE_CLUSTER.values(live_name=null())


@dataclass(frozen=True)
class ClusterRow:
    id: str
    project_id: str
    cloud_id: str
    job_id: str | None
    service_id: str | None
    started: bool
    withdrawn: bool
    revision: int
    cluster: Cluster
    input: ClusterInput
    """As accepted: whoever starts the workflow starts it with exactly this."""


@dataclass(frozen=True)
class JobRow:
    id: str
    project_id: str
    cloud_id: str
    schedule_id: str | None
    started: bool
    withdrawn: bool
    revision: int
    job: Job
    input: JobInput
    """As accepted: whoever starts the workflow starts it with exactly this."""


@dataclass(frozen=True)
class SilentHeads:
    heard_since: datetime | None
    """Since when the API could hear without a gap; None: it can't now."""
    total: int
    """Heads of running clusters."""
    silent: list[tuple[str, str, datetime]]
    """(cluster id, node id, last heard)."""


async def write_cluster(
    db: Database, cluster: Cluster, nodes: list[Node], node_configs: dict[str, dict[str, Any]], events: list[Event]
) -> bool:
    """The cluster, those of its nodes that are given, and what happened. ``node_configs``: by node id, what
    Ray on it gets; once per node is enough. False: there is no such row, or it was withdrawn."""
    async with db.begin() as conn:
        values = {
            "its_id": cluster.id,
            "its_revision": cluster.revision,
            "state": cluster.state,
            "revision": cluster.revision,
            "doc": cluster.model_dump(mode="json"),
            "ended_at": cluster.ended_at,
        }
        wrote = await conn.execute(_END_CLUSTER if cluster.state.settled else _UPDATE_CLUSTER, values)
        if wrote.rowcount:
            await _write_nodes(conn, cluster.revision, nodes, node_configs)
        elif not await takes_writes(conn, clusters, cluster.id):
            return False
        await insert_events(conn, events)
        return True


async def write_job(db: Database, job: Job, events: list[Event]) -> bool:
    """The job with its runs, and what happened. False: there is no such row, or it was withdrawn."""
    async with db.begin() as conn:
        values = {
            "its_id": job.id,
            "its_revision": job.revision,
            "state": job.state,
            "revision": job.revision,
            "doc": job.model_dump(mode="json"),
            "ended_at": job.ended_at,
        }
        wrote = await conn.execute(_UPDATE_JOB, values)
        if not wrote.rowcount and not await takes_writes(conn, jobs, job.id):
            return False
        await insert_events(conn, events)
        return True


async def add_events(db: Database, events: list[Event]) -> None:
    """Repeatable: an event's id is written once."""
    async with db.begin() as conn:
        await insert_events(conn, events)


async def insert_cluster(conn: AsyncConnection, cluster: Cluster, arg: ClusterInput) -> bool:
    """Insert-or-ignore by id and by living name; False: nothing was inserted."""
    row = {
        "id": cluster.id,
        "project_id": arg.project_id,
        "cloud_id": arg.cloud_id,
        "name": cluster.name,
        "live_name": cluster.name,
        "state": cluster.state,
        "revision": cluster.revision,
        "doc": cluster.model_dump(mode="json"),
        "input": arg.model_dump(mode="json"),
        "job_id": arg.job_id,
        "service_id": arg.service_id,
        "created_at": cluster.created_at,
    }
    return await insert_new(conn, clusters, row)


async def insert_made_cluster(db: Database, cluster: Cluster, arg: ClusterInput) -> bool:
    """The row of a cluster that was made for a job or a service; its id is derived from theirs, so a repeat changes
    nothing. False: there is none, for another cluster has the name."""
    async with db.begin() as conn:
        if await insert_cluster(conn, cluster, arg):
            return True
        return await conn.scalar(select(clusters.c.id).where(clusters.c.id == cluster.id)) is not None


async def insert_job(conn: AsyncConnection, job: Job, arg: JobInput) -> bool:
    """Insert-or-ignore by id. Both configs must be masked. False: it was there already."""
    row = {
        "id": job.id,
        "project_id": arg.project_id,
        "cloud_id": arg.cloud_id,
        "name": job.name,
        "state": job.state,
        "revision": job.revision,
        "doc": job.model_dump(mode="json"),
        "input": arg.model_dump(mode="json"),
        "schedule_id": job.schedule_id,
        "created_at": job.created_at,
    }
    return await insert_new(conn, jobs, row)


async def unstarted(db: Database, older_than_s: float) -> tuple[list[ClusterRow], list[JobRow]]:
    """Accepted clusters and jobs whose workflow is not known to exist, oldest first. ``older_than_s`` leaves
    those alone that the API is about to start itself."""
    before = utcnow() - timedelta(seconds=older_than_s)
    async with db.read() as conn:
        cluster_rows = await conn.execute(
            select(clusters)
            .where(clusters.c.started.is_(False), clusters.c.withdrawn.is_(False), clusters.c.created_at <= before)
            .order_by(clusters.c.id)
            .limit(1000)
        )
        job_rows = await conn.execute(
            select(jobs)
            .where(jobs.c.started.is_(False), jobs.c.withdrawn.is_(False), jobs.c.created_at <= before)
            .order_by(jobs.c.id)
            .limit(1000)
        )
        return [_cluster_row(r) for r in cluster_rows], [_job_row(r) for r in job_rows]


async def mark_started(db: Database, kind: str, id: str) -> None:
    """Its workflow exists. ``kind``: ``cluster`` or ``job``; of a service nothing is noted, its deploys are
    (:func:`store.services.claim_deploy`)."""
    table = _TABLES[kind]
    if "started" not in table.c:
        return
    async with db.begin() as conn:
        await conn.execute(update(table).where(table.c.id == id).values(started=True))


async def is_withdrawn(db: Database, kind: str, id: str) -> bool:
    """True too when there is no such row. ``kind``: ``cluster``, ``job`` or ``service``."""
    async with db.read() as conn:
        return not await takes_writes(conn, _TABLES[kind], id)


async def load_cluster(db: Database, id: str) -> ClusterRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(clusters).where(clusters.c.id == id))).first()
        return _cluster_row(row) if row else None


async def load_job(db: Database, id: str) -> JobRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(jobs).where(jobs.c.id == id))).first()
        return _job_row(row) if row else None


async def load_nodes(db: Database, cluster_id: str) -> list[Node]:
    """All nodes that the cluster ever asked for, oldest first."""
    async with db.read() as conn:
        rows = await conn.execute(
            select(nodes.c.doc).where(nodes.c.cluster_id == cluster_id).order_by(nodes.c.created_at, nodes.c.id)
        )
        return [Node.model_validate(r.doc) for r in rows]


async def write_sealed(conn: AsyncConnection, keys: Keys, id: str, project_id: str, value: dict[str, str]) -> None:
    """A user's env values, encrypted. Repeatable."""
    row = {"id": id, "project_id": project_id, "ciphertext": keys.seal(value), "created_at": utcnow()}
    await insert_new(conn, sealed, row)


async def read_sealed(db: Database, keys: Keys, id: str) -> dict[str, str] | None:
    """None: gone by retention. For the hand of an agent only, never for an answer or a history."""
    async with db.read() as conn:
        ciphertext = await conn.scalar(select(sealed.c.ciphertext).where(sealed.c.id == id))
    return None if ciphertext is None else {str(k): str(v) for k, v in keys.open(ciphertext).items()}


async def silent_heads(db: Database, now: datetime, silence_s: float) -> SilentHeads:
    """Running clusters whose current head has not been heard for ``silence_s``, counted from when we began to hear.
    Nobody is silent while we can't hear."""
    current = and_(
        clusters.c.state == ClusterState.RUNNING,
        clusters.c.ended_at.is_(None),
        nodes.c.role == NodeRole.HEAD,
        nodes.c.state == NodeState.RUNNING,
        nodes.c.ended_at.is_(None),
    )
    async with db.read() as conn:
        heard = (await conn.execute(select(hearing.c.since, hearing.c.last))).first()
        heads = nodes.join(clusters, clusters.c.id == nodes.c.cluster_id)
        if heard is None or (now - heard.last).total_seconds() > HEARING_GAP_S:
            return SilentHeads(None, await conn.scalar(select(func.count()).select_from(heads).where(current)) or 0, [])
        limit = now - timedelta(seconds=silence_s)
        last = func.coalesce(reports.c.at, nodes.c.created_at)
        quiet = or_(reports.c.at < limit, and_(reports.c.at.is_(None), nodes.c.created_at < limit))
        rows = await conn.execute(
            # The newest head only: a replaced one may not be marked as ended yet.
            select(nodes.c.cluster_id, nodes.c.id, last.label("at"), quiet.label("quiet"))
            .select_from(heads.outerjoin(reports, reports.c.node_id == nodes.c.id))
            .where(current)
            .order_by(nodes.c.cluster_id, nodes.c.generation)
        )
        newest = {r.cluster_id: r for r in rows}
    silent: list[tuple[str, str, datetime]] = []
    if heard.since <= limit:
        silent = [(r.cluster_id, r.id, max(r.at, heard.since)) for r in newest.values() if r.quiet]
    return SilentHeads(heard.since, len(newest), silent)


async def unheard_heads(db: Database, now: datetime, silence_s: float) -> list[tuple[str, str, datetime]]:
    """Heads whose machine was launched longer than ``silence_s`` ago and from which no report has come since, while
    we could hear: (cluster, node, since). A machine may have died before its agent said a word."""
    launched = (NodeState.LAUNCHED, NodeState.REGISTERED)
    async with db.read() as conn:
        heard = (await conn.execute(select(hearing.c.since, hearing.c.last))).first()
        limit = now - timedelta(seconds=silence_s)
        if heard is None or (now - heard.last).total_seconds() > HEARING_GAP_S or heard.since > limit:
            return []
        last = func.coalesce(reports.c.at, nodes.c.created_at)
        rows = await conn.execute(
            select(nodes.c.cluster_id, nodes.c.id, last.label("at"))
            .select_from(
                nodes.join(clusters, clusters.c.id == nodes.c.cluster_id).outerjoin(
                    reports, reports.c.node_id == nodes.c.id
                )
            )
            .where(
                clusters.c.state.in_((ClusterState.STARTING, ClusterState.RECOVERING)),
                clusters.c.ended_at.is_(None),
                nodes.c.role == NodeRole.HEAD,
                nodes.c.state.in_(launched),
                nodes.c.ended_at.is_(None),
                last < limit,
            )
        )
        return [(row.cluster_id, row.id, max(row.at, heard.since)) for row in rows]


_TABLES = {"cluster": clusters, "job": jobs, "service": services}


async def takes_writes(conn: AsyncConnection, table: Any, id: str) -> bool:
    withdrawn = await conn.scalar(select(table.c.withdrawn).where(table.c.id == id))
    return withdrawn is False or withdrawn == 0


async def _write_nodes(
    conn: AsyncConnection, revision: int, items: list[Node], configs: dict[str, dict[str, Any]]
) -> None:
    for node in items:
        values: dict[str, Any] = {
            "role": node.role,
            "generation": node.generation,
            "state": node.state,
            "revision": revision,
            "doc": node.model_dump(mode="json"),
            "ended_at": node.ended_at,
        }
        if node.id in configs:
            values["config"] = configs[node.id]
        await conn.execute(
            insert(conn, nodes)
            .values(id=node.id, cluster_id=node.cluster_id, created_at=node.created_at, **values)
            .on_conflict_do_update(index_elements=["id"], set_=values)
        )
    if ended := [node.id for node in items if node.ended_at is not None]:
        await close_commands(conn, ended)


async def insert_events(conn: AsyncConnection, items: list[Event]) -> None:
    for event in items:
        await insert_new(conn, events, event.model_dump())


def _cluster_row(r: Row[Any]) -> ClusterRow:
    return ClusterRow(
        id=r.id,
        project_id=r.project_id,
        cloud_id=r.cloud_id,
        job_id=r.job_id,
        service_id=r.service_id,
        started=r.started,
        withdrawn=r.withdrawn,
        revision=r.revision,
        cluster=Cluster.model_validate(r.doc),
        input=ClusterInput.model_validate(r.input),
    )


def _job_row(r: Row[Any]) -> JobRow:
    return JobRow(
        id=r.id,
        project_id=r.project_id,
        cloud_id=r.cloud_id,
        schedule_id=r.schedule_id,
        started=r.started,
        withdrawn=r.withdrawn,
        revision=r.revision,
        job=Job.model_validate(r.doc),
        input=JobInput.model_validate(r.input),
    )
