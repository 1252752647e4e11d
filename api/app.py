"""The API process: takes HTTP requests, writes rows and messages workflows. It never runs a step of a workflow."""

from __future__ import annotations

import fcntl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO

import structlog
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from temporalio.client import Client

from api import errors, health
from api.agents import routes as agents
from api.clouds import oidc
from api.clouds import routes as clouds
from api.clouds import updates as cloud_updates
from api.clusters import routes as clusters
from api.compute_configs import routes as compute_configs
from api.jobs import routes as jobs
from api.kit.context import Context, Offers
from api.people import routes as users
from api.schedules import routes as schedules
from api.services import routes as services
from api.services import tokens as service_tokens
from api.storage import uploads
from clouds.contract.bucket import Bucket
from clouds.registry import Vendors
from heliostat.errors import Conflict, HeliostatError, InvalidRequest, TooLarge, Unavailable
from runtime.keys import Keys, load_or_create
from runtime.settings import Settings
from runtime.telemetry import RequestMetrics, trace_requests
from runtime.temporal import connect
from store.database import Database, latest_revision, sqlite_file

log = structlog.get_logger(__name__)

BODY_LIMIT = 2**20
"""Bytes of a body: it becomes a workflow's input, which Temporal limits to 2 MB. Code goes to the bucket."""


def create_app(
    settings: Settings,
    *,
    buckets: Mapping[str, Bucket],
    bundles: Mapping[str, bytes] | None = None,
    vendors: Vendors | None = None,
    offers: Offers | None = None,
    temporal: Client | None = None,
    keys: Keys | None = None,
) -> FastAPI:
    """The application, not yet connected; its lifespan connects and disconnects.

    Args:
        buckets: by cloud id. The caller makes them: the API knows no concrete cloud.
        vendors: of the clouds that can be registered; None: registering is refused, what is registered works.
        offers: what the providers offer, by provider.
        bundles: the agent's zips that machines may fetch, by sha256.
        temporal: a connected client; default: one of its own, lazy, so that the API answers while Temporal is away.
        keys: default: from the settings.

    Raises:
        InvalidRequest: several APIs were announced on SQLite.
    """
    if settings.api_processes > 1 and sqlite_file(settings.records_url) is not None:
        raise InvalidRequest(
            f"{settings.api_processes} API processes can't share a SQLite file.",
            remedy="Set HELIOSTAT_DATABASE_URL to a PostgreSQL database, or HELIOSTAT_API_PROCESSES to 1.",
            field="HELIOSTAT_API_PROCESSES",
        )

    process_keys = keys or load_or_create(settings.home, settings.secret_key)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        db = Database(settings.records_url)
        records = sqlite_file(settings.records_url)
        lock = _lock(records) if records is not None else None
        try:
            await db.connect()
            await _check_schema(db)
            ctx = Context.of(
                settings,
                db,
                process_keys,
                temporal or await connect(settings, lazy=True),
                buckets=buckets,
                bundles=bundles,
                offers=offers,
                vendors=vendors,
            )
            app.state.context = ctx
            reconciling = [
                ctx.tasks.start(schedules.reconcile_all(ctx)),
                ctx.tasks.start(service_tokens.reconcile_all(ctx)),
            ]
            yield
            for task in reconciling:
                task.cancel()
            await ctx.tasks.wait()
        finally:
            await db.dispose()
            if lock is not None:
                lock.close()

    app = FastAPI(
        title="Heliostat",
        version="v1",
        summary="Ray clusters, jobs and services on your own machines.",
        lifespan=lifespan,
        responses={"default": {"description": "problem+json: `code`, `detail` (what happened), `remedy`, `field`."}},
    )
    errors.install(app)
    for noun in (
        users,
        clouds,
        cloud_updates,
        compute_configs,
        clusters,
        jobs,
        services,
        schedules,
        uploads,
        agents,
        health,
        oidc,
    ):
        app.include_router(noun.router)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestMetrics)
    trace_requests(app, settings)
    return app


async def _check_schema(db: Database) -> None:
    found = await db.schema_revision()
    if found != latest_revision():
        raise Conflict(
            f"The records have schema {found or '(none)'}; this code needs {latest_revision()}.",
            remedy="Run `python -m store.migrate` (`make up` does it), or start the release that wrote the records.",
        )


def _lock(records: Path) -> IO[str]:
    """SQLite records have one API, which keeps what it knows of nodes and tokens in memory. The lock dies with the
    process."""
    path = records.with_name(f"{records.name}.api-lock")
    try:
        lock = path.open("w")
    except OSError as e:
        raise Unavailable(f"Can't write {path}: {e.strerror}.", remedy="Check HELIOSTAT_HOME and its disk.") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Conflict(
            f"Another API process already uses the records in {records}.",
            remedy="Stop it, or use PostgreSQL (HELIOSTAT_DATABASE_URL) for two or more.",
        ) from None
    return lock


class BodyLimit:
    """Refuses a body over BODY_LIMIT before it is in memory, whether its length was announced or not."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > BODY_LIMIT:
            await errors.problem(_too_large())(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY_LIMIT:
                raise _too_large()
            return message

        await self.app(scope, counted, send)


def _too_large() -> HeliostatError:
    return TooLarge(
        f"The request's body is over {BODY_LIMIT} bytes.",
        remedy="Code and data go to the bucket (POST /v1/uploads), not into a request.",
    )
