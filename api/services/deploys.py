"""Deploying: a request becomes versions, a deploy and, the first time, a service; then its workflow is told.

Everything is checked first. Then one transaction (``api/services/rows.py``) checks what depends on the service's state,
and writes. The workflow is told by signal-with-start; a process that dies in between leaves a deploy that the monitor
tells it of. See ``api/kit/acceptance.py`` for "no stays no".
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from api.compute_configs.placement import Offers
from api.compute_configs.resolve import resolve_compute_config
from api.kit.acceptance import start, start_again
from api.kit.auth import Caller, Project
from api.kit.idempotency import Order, claim, earlier
from api.kit.temporal import calling
from api.services.checks import check_config
from api.services.rows import New, write
from api.services.view import answer
from api.storage import packages
from heliostat.errors import HeliostatError, InvalidRequest, NotFound
from heliostat.models.common import new_id
from heliostat.models.services import Service, ServiceConfig, ServiceDeploy
from runtime.messages.services import DeployRequest, deploy_service
from store.outbox import Outbox
from store.services import rows as store
from store.services.deploys import withdraw_deploy
from store.tables import service_deploys


async def deploy(state: Any, me: Caller, order: Order, body: ServiceDeploy) -> Service:
    name, project = _target(me, body)
    async with state.db.read() as conn:
        before = await earlier(conn, project.id, order)
        if before is None:
            existing = await store.living_named(conn, project.id, name)
            news = [
                await _checked(conn, me, project, at, config, existing, state.offers) for at, config in _configs(body)
            ]
    if before is not None:
        return await _repeated(state, before)
    for new in news:
        named = [(f"{new.at}{field}", uri) for field, uri in new.config.packages()]
        excludes = f"{new.at}excludes" if new.config.excludes else None
        await packages.check(state, project.id, new.cloud.id, named, "service", excludes)
    _alike(news)
    id = new_id("dp")
    async with state.db.begin() as conn:
        if mine := await claim(conn, project.id, order, id):
            written = await write(state, conn, me, project, name, id, body, news)
        else:
            other = await earlier(conn, project.id, order)
    if not mine:
        assert other is not None
        return await _repeated(state, other)
    await start(
        state,
        "deploy",
        id,
        project.id,
        order,
        deploy_service(state.temporal, state.settings.task_queue, written.service.input, written.request),
        partial(withdraw_deploy, deploy_id=id),
    )
    return await answer(state, written.service.id, _upto(written.request))


async def deliver(state: Any, service_id: str) -> None:
    """Delivers deploys that the workflow may not have: their request may still be under way, or its process died."""
    async with calling():
        await Outbox(state.db, state.temporal, state.settings.task_queue).deliver_deploys(service_id)


async def _repeated(state: Any, deploy_id: str) -> Service:
    d = service_deploys.c
    async with state.db.read() as conn:
        row = (await conn.execute(select(d.service_id, d.started, d.request).where(d.id == deploy_id))).first()
    if row is None:
        raise NotFound(f"Deploy {deploy_id} is gone by retention.", remedy="Use a new Idempotency-Key.")
    if not row.started:
        service = await store.load_service(state.db, row.service_id)
        assert service is not None
        request = DeployRequest.model_validate(row.request)
        starting = deploy_service(state.temporal, state.settings.task_queue, service.input, request)
        await start_again(state, "deploy", deploy_id, starting)
    return await answer(state, row.service_id, _upto(DeployRequest.model_validate(row.request)))


def _upto(request: DeployRequest) -> int | None:
    return max((v.number for v in request.versions), default=None)


# --- checked before -----------------------------------------------------------------------------------------


def _configs(body: ServiceDeploy) -> list[tuple[str, ServiceConfig]]:
    if body.config is not None:
        return [("config.", body.config)]
    return [(f"configs.{i}.", config) for i, config in enumerate(body.configs)]


def _target(me: Caller, body: ServiceDeploy) -> tuple[str, Project]:
    """The service's name and its project, wherever in the request they stand."""
    found: dict[str, str] = {}
    for what in ("name", "project"):
        said = [(what, getattr(body, what)), *((f"{at}{what}", getattr(c, what)) for at, c in _configs(body))]
        given = [(field, value) for field, value in said if value is not None]
        for field, value in given:
            if value != given[0][1]:
                raise InvalidRequest(
                    f"Two {what}s are given: {given[0][1]!r} and {value!r}.",
                    remedy="One deploy is of one service: leave out one of them.",
                    field=field,
                )
        if given:
            found[what], found[f"{what}.field"] = given[0][1], given[0][0]
    if "name" not in found:
        raise InvalidRequest(
            "The service has no name.",
            remedy="Give it one: it is how the next deploy finds it.",
            field="config.name" if body.config is not None else "configs.0.name",
        )
    return found["name"], me.project(found.get("project"), found.get("project.field", "project"))


async def _checked(
    conn: AsyncConnection,
    me: Caller,
    project: Project,
    at: str,
    config: ServiceConfig,
    existing: store.ServiceRow | None,
    offers: Offers,
) -> New:
    check_config(at, config)
    otherwise = existing.cloud_id if existing is not None else None
    try:
        shape, cloud = await resolve_compute_config(
            conn, me, project, config.compute_config, config.cloud, otherwise, offers=offers
        )
    except HeliostatError as e:
        e.field = f"{at}{e.field}" if e.field is not None else None
        raise
    return New(at, config, shape, cloud)


def _alike(news: list[New]) -> None:
    """What all versions of one service share."""
    for new in news[1:]:
        if new.cloud.id != news[0].cloud.id:
            raise InvalidRequest(
                f"The configs are for clouds {news[0].cloud.name} and {new.cloud.name}.",
                remedy="A service is in one cloud.",
                field=f"{new.at}cloud",
            )
        if new.config.query_auth_token_enabled != news[0].config.query_auth_token_enabled:
            raise InvalidRequest(
                "The configs do not agree on whether requests need a token.",
                remedy="All versions answer at one endpoint: say the same in each.",
                field=f"{new.at}query_auth_token_enabled",
            )
