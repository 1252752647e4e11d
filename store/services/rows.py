"""Services, their versions, deploys and tokens in the records.

The row of a service and those of its versions are written by its workflow under the service's revision, as all
projections are (``store/revisions.py``). What the API accepts it writes by ``store/services/deploys.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, bindparam, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import Event, Result, utcnow
from heliostat.models.services import Service, ServiceConfig, ServiceState, ServiceVersion, ServiceVersionState
from runtime.messages.services import DeployRequest, GateTokens, ServiceInput, VersionSpec
from store.database import Database
from store.revisions import insert_events, newer, takes_writes
from store.tables import service_deploys, service_versions, services

_UPDATE_SERVICE = newer(services)
_UPDATE_VERSION = update(service_versions).where(
    service_versions.c.id == bindparam("its_id"),
    service_versions.c.service_id == bindparam("its_service"),
    service_versions.c.revision <= bindparam("its_revision"),
)
_NOT_IN_DOC = {"versions", "query_auth_token", "query_auth_tokens", "tags"}
"""``tags`` stand in ``input``: a deploy may change them while the workflow, which does not know, writes ``doc``."""


class StoredToken(Result):
    """One of the services' ``tokens``. The token itself lies in ``sealed`` under ``id``."""

    id: str
    created_at: datetime
    sha256: str
    told: bool = False
    """Acknowledged: the workflow knows it. False: the whole set is sent again."""
    deleted: bool = False
    """It was deleted, but the workflow does not know that yet."""


@dataclass(frozen=True)
class ServiceRow:
    id: str
    project_id: str
    cloud_id: str
    name: str
    withdrawn: bool
    revision: int
    service: Service
    """Without versions and tokens."""
    input: ServiceInput
    """What its workflow is started with; ``revision`` is the row's."""
    told_revision: int
    """The row's when the service was made or started again: the same as ``revision`` until its workflow has written."""
    tokens: list[StoredToken]
    """The primary one first; see ``valid_tokens``."""

    @property
    def state(self) -> ServiceState:
        return self.service.state

    @property
    def valid_tokens(self) -> list[StoredToken]:
        return [t for t in self.tokens if not t.deleted]

    @property
    def has_pending_tokens(self) -> bool:
        return any(t.deleted or not t.told for t in self.tokens)

    @property
    def gate(self) -> GateTokens:
        """The tokens that its proxies require: none, for a service without tokens."""
        valid = self.valid_tokens
        return GateTokens(enabled=bool(valid), hashes=[t.sha256 for t in valid])


@dataclass(frozen=True)
class VersionRow:
    id: str
    service_id: str
    deploy_id: str
    number: int
    name: str
    state: ServiceVersionState
    env_ref: str | None
    spec: VersionSpec
    version: ServiceVersion
    """With its config, env values masked."""
    ended_at: datetime | None


@dataclass(frozen=True)
class ServiceNames:
    id: str
    name: str
    project: str
    cloud_id: str
    versions: dict[str, str] = field(default_factory=dict)
    """Names of those that have not ended, by id."""
    state: ServiceState = ServiceState.STARTING
    has_endpoint: bool = False
    """By its workflow's last word."""
    grpc: bool = False
    """One of those versions speaks it."""
    endpoint_trouble: str = ""
    """As its workflow was told it last."""


# --- what the workflow writes and asks --------------------------------------------------------------------


async def write_service(db: Database, service: Service, versions: list[ServiceVersion], events: list[Event]) -> bool:
    """The service, those of its versions that are given (their config is not touched), and what happened. A smaller
    revision than the row's changes nothing. False: there is no such row, or it was withdrawn."""
    async with db.begin() as conn:
        values = {
            "its_id": service.id,
            "its_revision": service.revision,
            "state": service.state,
            "revision": service.revision,
            "doc": service_doc(service),
            "ended_at": service.ended_at,
        }
        wrote = await conn.execute(_UPDATE_SERVICE, values)
        if not wrote.rowcount and not await takes_writes(conn, services, service.id):
            return False
        for version in versions:
            await conn.execute(
                _UPDATE_VERSION,
                {
                    "its_id": version.id,
                    "its_service": service.id,
                    "its_revision": service.revision,
                    "state": version.state,
                    "revision": service.revision,
                    "doc": version_doc(version),
                    "ended_at": version.ended_at,
                },
            )
        await insert_events(conn, events)
        return True


async def end_versions(db: Database, versions: list[ServiceVersion]) -> None:
    """Of a service whose workflow knows nothing of them: it is a second one, and will never write them."""
    v = service_versions.c
    async with db.begin() as conn:
        for version in versions:
            await conn.execute(
                update(service_versions)
                .where(v.id == version.id, v.ended_at.is_(None))
                .values(state=version.state, doc=version_doc(version), ended_at=version.ended_at)
            )


async def claim_deploy(db: Database, deploy_id: str) -> bool:
    """Says that its service's workflow has it, after which its acceptance can't be taken back. False: it was taken back
    before, there is no such deploy, or its service is terminated since: who found it not started may tell it late.
    Repeatable."""
    d = service_deploys.c
    async with db.begin() as conn:
        done = await conn.execute(
            update(service_deploys).where(d.id == deploy_id, d.withdrawn.is_(False)).values(started=True)
        )
        state = await conn.scalar(select(services.c.state).where(services.c.id == d.service_id, d.id == deploy_id))
        return bool(done.rowcount) and state != ServiceState.TERMINATED


async def unstarted_deploys(
    db: Database, older_than_s: float, service_id: str | None = None
) -> list[tuple[ServiceInput, DeployRequest]]:
    """Accepted deploys (of one service) that are not known to have reached their workflow, oldest first.
    ``older_than_s`` leaves those alone that the API is about to tell it itself."""
    d = service_deploys.c
    query = (
        select(d.request, services.c.input, services.c.revision)
        .select_from(service_deploys.join(services, services.c.id == d.service_id))
        .where(
            d.started.is_(False),
            d.withdrawn.is_(False),
            services.c.withdrawn.is_(False),
            d.created_at <= utcnow() - timedelta(seconds=older_than_s),
        )
        .order_by(d.created_at, d.id)
        .limit(1000)
    )
    if service_id is not None:
        query = query.where(d.service_id == service_id)
    async with db.read() as conn:
        rows = (await conn.execute(query)).all()
    return [(_input(r.input, r.revision), DeployRequest.model_validate(r.request)) for r in rows]


async def names(db: Database) -> list[ServiceNames]:
    """Of all services that have not ended, for the look after their endpoints and the labels of its metrics."""
    async with db.read() as conn:
        rows = await conn.execute(
            select(services.c.id, services.c.name, services.c.doc, services.c.cloud_id, services.c.state).where(
                services.c.withdrawn.is_(False), services.c.ended_at.is_(None)
            )
        )
        living = list(rows)
        v, ids = service_versions.c, [r.id for r in living]
        found = await conn.execute(
            select(v.id, v.service_id, v.name, v.spec).where(v.service_id.in_(ids), v.ended_at.is_(None))
        )
        versions = list(found)
    return [
        ServiceNames(
            id=r.id,
            name=r.name,
            project=r.doc["project"],
            cloud_id=r.cloud_id,
            versions={v.id: v.name for v in versions if v.service_id == r.id},
            state=ServiceState(r.state),
            has_endpoint=bool(r.doc["query_url"]),
            grpc=any(v.spec["grpc"] for v in versions if v.service_id == r.id),
            endpoint_trouble=r.doc.get("endpoint_trouble", ""),
        )
        for r in living
    ]


# --- what is looked at ------------------------------------------------------------------------------------


async def load_service(db: Database, id: str) -> ServiceRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(services).where(services.c.id == id))).first()
        return service_row(row) if row else None


async def load_version(db: Database, id: str) -> VersionRow | None:
    async with db.read() as conn:
        row = (await conn.execute(select(service_versions).where(service_versions.c.id == id))).first()
        return version_row(row) if row else None


async def living_named(conn: AsyncConnection, project_id: str, name: str) -> ServiceRow | None:
    """The service that has this name now, terminated or not."""
    found = await conn.execute(
        select(services).where(services.c.project_id == project_id, services.c.live_name == name)
    )
    row = found.first()
    return service_row(row) if row else None


async def versions_of(conn: AsyncConnection, service_id: str, ended: int | None = None) -> list[VersionRow]:
    """Newest first; ``ended``: only so many of those that have ended."""
    v = service_versions.c
    mine = select(service_versions).where(v.service_id == service_id)
    if ended is None:
        return [version_row(r) for r in await conn.execute(mine.order_by(v.number.desc()))]
    living = await conn.execute(mine.where(v.ended_at.is_(None)))
    over = await conn.execute(mine.where(v.ended_at.is_not(None)).order_by(v.number.desc()).limit(ended))
    return sorted((version_row(r) for r in [*living, *over]), key=lambda row: -row.number)


async def lock_service(conn: AsyncConnection, id: str) -> ServiceRow | None:
    """Until the transaction ends nobody else writes it. None: there is none, or it was withdrawn."""
    query = select(services).where(services.c.id == id, services.c.withdrawn.is_(False)).with_for_update()
    row = (await conn.execute(query)).first()
    return service_row(row) if row else None


# --- rows -------------------------------------------------------------------------------------------------


def service_doc(service: Service) -> dict[str, Any]:
    return service.model_dump(mode="json", exclude=_NOT_IN_DOC)


def stored_service(r: Row[Any]) -> Service:
    """Of a row's ``doc`` and ``input``."""
    return Service.model_validate({**r.doc, "tags": r.input["tags"]})


def version_doc(version: ServiceVersion) -> dict[str, Any]:
    return version.model_dump(mode="json", exclude={"config", "traffic"})


def _input(stored: dict[str, Any], revision: int) -> ServiceInput:
    return ServiceInput.model_validate({**stored, "revision": revision})


def service_row(r: Row[Any]) -> ServiceRow:
    return ServiceRow(
        id=r.id,
        project_id=r.project_id,
        cloud_id=r.cloud_id,
        name=r.name,
        withdrawn=r.withdrawn,
        revision=r.revision,
        service=stored_service(r),
        input=_input(r.input, r.revision),
        told_revision=r.input["revision"],
        tokens=[StoredToken.model_validate(t) for t in r.tokens],
    )


def version_row(r: Row[Any]) -> VersionRow:
    config = ServiceConfig.model_validate(r.config)
    return VersionRow(
        id=r.id,
        service_id=r.service_id,
        deploy_id=r.deploy_id,
        number=r.number,
        name=r.name,
        state=ServiceVersionState(r.state),
        env_ref=r.env_ref,
        spec=VersionSpec.model_validate(r.spec),
        version=ServiceVersion.model_validate({**r.doc, "config": config}),
        ended_at=r.ended_at,
    )
