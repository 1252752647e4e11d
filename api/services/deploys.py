"""Deploying: a request becomes versions, a deploy and, the first time, a service; then its workflow gets the deploy.

What depends on the service's state is checked in the transaction that writes (``api/services/rows.py``). The workflow
gets the deploy by signal-with-start; if this process dies in between, the monitor delivers it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from api.compute_configs.resolve import resolve_compute_config
from api.kit.acceptance import deleted_by_retention, ensure_started
from api.kit.callers import Caller, Project
from api.kit.context import Context
from api.services.checks import check_config
from api.services.rows import NewVersion, WrittenDeploy, write
from api.services.view import answer
from api.storage.packages import check_packages
from heliostat.errors import HeliostatError, InvalidRequest
from heliostat.models.common import new_id
from heliostat.models.services import Service, ServiceConfig, ServiceDeploy
from runtime.messages.services import DeployRequest, ServiceInput, deploy_service
from store.acceptance import Kind
from store.database import AsyncConnection
from store.services.deploys import withdraw_deploy
from store.services.find import load_deploy
from store.services.rows import ServiceRow, living_named, load_service


@dataclass
class NewDeploy:
    """See ``api.kit.acceptance.Acceptable``."""

    ctx: Context
    me: Caller
    project: Project
    name: str
    body: ServiceDeploy
    id: str = field(default_factory=lambda: new_id("dp"), init=False)
    kind: Kind = field(default="deploy", init=False)
    versions: list[NewVersion] = field(default_factory=list, init=False)
    written: WrittenDeploy = field(init=False)

    @classmethod
    def of(cls, ctx: Context, me: Caller, body: ServiceDeploy) -> NewDeploy:
        name, project = _target(me, body)
        return cls(ctx, me, project, name, body)

    @property
    def project_id(self) -> str:
        return self.project.id

    async def check(self, conn: AsyncConnection) -> None:
        existing = await living_named(conn, self.project.id, self.name)
        self.versions = [await self._version(conn, at, config, existing) for at, config in _configs(self.body)]

    async def _version(
        self, conn: AsyncConnection, at: str, config: ServiceConfig, existing: ServiceRow | None
    ) -> NewVersion:
        check_config(at, config)
        default_cloud = existing.cloud_id if existing is not None else None
        try:
            compute_config, cloud = await resolve_compute_config(
                conn,
                self.me,
                self.project,
                config.compute_config,
                config.cloud,
                default_cloud,
                offers=self.ctx.offers,
            )
        except HeliostatError as e:
            e.field = f"{at}{e.field}" if e.field is not None else None
            raise
        return NewVersion(at, config, compute_config, cloud)

    async def check_code(self) -> None:
        for new in self.versions:
            named = [(f"{new.at}{field}", uri) for field, uri in new.config.packages()]
            excludes = f"{new.at}excludes" if new.config.excludes else None
            await check_packages(self.ctx.buckets, self.project.id, new.cloud.id, named, "service", excludes)
        _check_agreement(self.versions)

    async def write(self, conn: AsyncConnection) -> None:
        self.written = await write(self.ctx, conn, self.me, self.project, self.name, self.id, self.body, self.versions)

    async def start(self) -> None:
        await _deliver(self.ctx, self.written.service.input, self.written.request)

    async def cancel(self, conn: AsyncConnection) -> bool:
        return await withdraw_deploy(conn, self.id)

    async def answer(self) -> Service:
        return await answer(self.ctx, self.written.service.id, _newest(self.written.request))

    async def repeat(self, id: str) -> Service:
        async with self.ctx.db.read() as conn:
            row = await load_deploy(conn, id)
        if row is None:
            raise deleted_by_retention("Deploy", id)
        if not row.started:
            service = await load_service(self.ctx.db, row.service_id)
            assert service is not None
            await ensure_started(self.ctx, "deploy", id, _deliver(self.ctx, service.input, row.request))
        return await answer(self.ctx, row.service_id, _newest(row.request))


async def _deliver(ctx: Context, arg: ServiceInput, request: DeployRequest) -> None:
    await deploy_service(ctx.temporal, ctx.settings.task_queue, arg, request)


def _newest(request: DeployRequest) -> int | None:
    return max((v.number for v in request.versions), default=None)


def _configs(body: ServiceDeploy) -> list[tuple[str, ServiceConfig]]:
    """With where in the request they are."""
    if body.config is not None:
        return [("config.", body.config)]
    return [(f"configs.{i}.", config) for i, config in enumerate(body.configs)]


def _target(me: Caller, body: ServiceDeploy) -> tuple[str, Project]:
    """The service's name and its project, wherever in the request they are."""
    found: dict[str, str] = {}
    for what in ("name", "project"):
        places = [(what, getattr(body, what)), *((f"{at}{what}", getattr(c, what)) for at, c in _configs(body))]
        given = [(field, value) for field, value in places if value is not None]
        for field_, value in given:
            if value != given[0][1]:
                raise InvalidRequest(
                    f"Two {what}s are given: {given[0][1]!r} and {value!r}.",
                    remedy="One deploy is of one service: leave out one of them.",
                    field=field_,
                )
        if given:
            found[what], found[f"{what}.field"] = given[0][1], given[0][0]
    if "name" not in found:
        raise InvalidRequest(
            "The service has no name.",
            remedy="Give it one: the next deploy finds the service by it.",
            field="config.name" if body.config is not None else "configs.0.name",
        )
    return found["name"], me.project(found.get("project"), found.get("project.field", "project"))


def _check_agreement(versions: list[NewVersion]) -> None:
    """What all versions of one service share."""
    for new in versions[1:]:
        first = versions[0]
        if new.cloud.id != first.cloud.id:
            raise InvalidRequest(
                f"The configs are for clouds {first.cloud.name} and {new.cloud.name}.",
                remedy="A service is in one cloud.",
                field=f"{new.at}cloud",
            )
        if new.config.query_auth_token_enabled != first.config.query_auth_token_enabled:
            raise InvalidRequest(
                "The configs do not agree on whether requests need a token.",
                remedy="All versions answer at one endpoint: set the same in each.",
                field=f"{new.at}query_auth_token_enabled",
            )
