"""What the API writes of services: one that is new or starts again, its versions, their deploy, tokens.

Each transaction locks the service's row first, so that two deploys at the same moment get different numbers. A deleted
service is marked as withdrawn: nobody sees it, and retention deletes its rows.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from sqlalchemy import delete, func, null, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from heliostat.models.common import utcnow
from heliostat.models.services import Service, ServiceState, ServiceVersion
from runtime.messages.services import DeployRequest, ServiceInput, VersionSpec
from store.database import insert_new
from store.services.rows import ServiceRow, StoredToken, lock_service, service_doc, version_doc
from store.tables import sealed, service_deploys, service_versions, services


async def insert_service(conn: AsyncConnection, service: Service, arg: ServiceInput, tokens: list[StoredToken]) -> bool:
    """Insert-or-ignore by id and by name; False: nothing was inserted."""
    row = {
        "id": service.id,
        "project_id": arg.project_id,
        "cloud_id": arg.cloud_id,
        "name": service.name,
        "live_name": service.name,
        "state": service.state,
        "revision": service.revision,
        "doc": service_doc(service),
        "input": arg.model_dump(mode="json"),
        "tokens": [t.model_dump(mode="json") for t in tokens],
        "created_at": service.created_at,
    }
    return await insert_new(conn, services, row)


async def retag_service(conn: AsyncConnection, row: ServiceRow, tags: dict[str, str]) -> ServiceRow:
    """Its workflow writes none: they may be changed while it runs. Call with the row locked."""
    arg = row.input.model_copy(update={"tags": tags})
    stored = arg.model_copy(update={"revision": row.told_revision})
    await conn.execute(update(services).where(services.c.id == row.id).values(input=stored.model_dump(mode="json")))
    return replace(row, service=row.service.model_copy(update={"tags": tags}), input=arg)


async def reopen_service(conn: AsyncConnection, row: ServiceRow, at: datetime) -> ServiceRow:
    """A terminated service starts again under the next revision, so that late writes of its former workflow change
    nothing. Call with the row locked."""
    revision = row.revision + 1
    arg = row.input.model_copy(update={"revision": revision})
    reopened = {
        "state": ServiceState.STARTING,
        "reason": "requested again",
        "waits_for": "",
        "state_since": at,
        "ended_at": None,
        "primary_version": None,
        "previous_version": None,
        "canary_version": None,
        "rollout": None,
        "gate_hashes": [],
        "revision": revision,
    }
    service = row.service.model_copy(update=reopened)
    await _put(conn, service, arg)
    return replace(row, revision=revision, told_revision=revision, service=service, input=arg)


async def _put(conn: AsyncConnection, service: Service, arg: ServiceInput) -> None:
    await conn.execute(
        update(services)
        .where(services.c.id == service.id)
        .values(
            state=service.state,
            revision=service.revision,
            doc=service_doc(service),
            input=arg.model_dump(mode="json"),
            ended_at=service.ended_at,
        )
    )


async def next_number(conn: AsyncConnection, service_id: str) -> int:
    """Call with the row locked."""
    v = service_versions.c
    return (await conn.scalar(select(func.max(v.number)).where(v.service_id == service_id)) or 0) + 1


async def insert_version(
    conn: AsyncConnection,
    project_id: str,
    deploy_id: str,
    spec: VersionSpec,
    version: ServiceVersion,
    env_ref: str | None,
) -> None:
    """``version.config`` must be masked. Call with the service's row locked."""
    await conn.execute(
        service_versions.insert().values(
            id=version.id,
            project_id=project_id,
            service_id=version.service_id,
            deploy_id=deploy_id,
            number=version.number,
            name=version.name,
            state=version.state,
            config=version.config.model_dump(mode="json"),
            env_ref=env_ref,
            spec=spec.model_dump(mode="json"),
            doc=version_doc(version),
            created_at=version.created_at,
        )
    )


async def insert_deploy(conn: AsyncConnection, project_id: str, service_id: str, request: DeployRequest) -> None:
    await conn.execute(
        service_deploys.insert().values(
            id=request.id,
            project_id=project_id,
            service_id=service_id,
            request=request.model_dump(mode="json"),
            created_at=utcnow(),
        )
    )


async def withdraw_deploy(conn: AsyncConnection, deploy_id: str) -> bool:
    """Cancels a deploy that its workflow does not have: its versions go, and with them their tags. If the workflow
    has written nothing and no other deploy waits for it, so does a service that was new; one that was started again is
    terminated as before. False: the workflow has it already."""
    d = service_deploys.c
    service_id = await conn.scalar(select(d.service_id).where(d.id == deploy_id))
    row = await lock_service(conn, service_id) if service_id is not None else None
    mine = update(service_deploys).where(d.id == deploy_id, d.started.is_(False), d.withdrawn.is_(False))
    if row is None or not (await conn.execute(mine.values(withdrawn=True))).rowcount:
        return False
    v = service_versions.c
    env = select(v.env_ref).where(v.deploy_id == deploy_id, v.env_ref.is_not(None))
    await conn.execute(delete(sealed).where(sealed.c.id.in_(env)))
    await conn.execute(delete(service_versions).where(v.deploy_id == deploy_id))
    newest = select(v.spec).where(v.service_id == row.id).order_by(v.number.desc()).limit(1)
    if (spec := await conn.scalar(newest)) is not None:
        row = await retag_service(conn, row, VersionSpec.model_validate(spec).tags)
    since = row.service.state_since  # when it was made, or started again: nobody has written since
    others = select(d.id).where(d.service_id == row.id, d.withdrawn.is_(False), d.created_at >= since).limit(1)
    if row.revision != row.told_revision or await conn.scalar(others) is not None:
        return True
    if row.told_revision == 0:
        await _withdraw(conn, row)
    else:
        now = utcnow()
        ended = {"state": ServiceState.TERMINATED, "reason": "", "state_since": now, "ended_at": now}
        await _put(conn, row.service.model_copy(update=ended), row.input)
    return True


async def delete_service(conn: AsyncConnection, row: ServiceRow) -> None:
    """Nobody sees it any more, its name is free, and its secrets are deleted at once. Call with the row locked."""
    await _withdraw(conn, row)
    v = service_versions.c
    env = select(v.env_ref).where(v.service_id == row.id, v.env_ref.is_not(None))
    await conn.execute(delete(sealed).where(sealed.c.id.in_(env)))


async def _withdraw(conn: AsyncConnection, row: ServiceRow) -> None:
    await conn.execute(
        update(services).where(services.c.id == row.id).values(withdrawn=True, live_name=null(), tokens=[])
    )
    await conn.execute(delete(sealed).where(sealed.c.id.in_([t.id for t in row.tokens])))
