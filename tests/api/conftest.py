"""The whole API on real records and a real Temporal server, called through its ASGI interface."""

from __future__ import annotations

import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.testing import WorkflowEnvironment

from api.app import create_app
from api.kit.context import Context
from clouds.local.bucket.bucket import LocalBucket
from clouds.vendors import InstalledVendors
from heliostat.models.clouds import Capabilities, Provider
from runtime.keys import Keys
from runtime.messages.common import SEARCH_ATTRIBUTES
from runtime.settings import Settings
from store.bootstrap import ensure_first
from store.clouds import register_cloud
from store.database import Database, migrate

TEMPORAL = Path(sys.executable).parent / "temporal"
CAN = Capabilities(max_cpu_per_node=2, max_memory_per_node=4 * 2**30)


@pytest.fixture(scope="session")
async def temporal() -> AsyncIterator[Client]:
    """A Temporal server of our own, with the settings of the embedded one."""
    async with await WorkflowEnvironment.start_local(
        data_converter=pydantic_data_converter,
        search_attributes=SEARCH_ATTRIBUTES,
        dev_server_existing_path=str(TEMPORAL),
        dev_server_log_level="error",
        dev_server_startup_timeout=timedelta(seconds=60),  # 5 s by default, which three at once exceed
        dev_server_extra_args=["--dynamic-config-value", "history.transferProcessorMaxPollRPS=1000"],
    ) as env:
        yield env.client


@dataclass
class World:
    """One installation: ``admin`` sees all, ``ada`` is in project ``team``, ``eve`` in project ``other``."""

    app: FastAPI
    db: Database
    keys: Keys
    settings: Settings
    bucket: LocalBucket
    cloud_id: str
    admin_token: str
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def context(self) -> Context:
        context: Context = self.app.state.context
        return context

    def change(self, **parts: Any) -> None:
        """Other parts for the requests that come from now on."""
        self.app.state.context = replace(self.context, **parts)

    def client(self, token: str | None) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers)

    @property
    def admin(self) -> httpx.AsyncClient:
        return self.client(self.admin_token)

    @property
    def ada(self) -> httpx.AsyncClient:
        return self.client(self.tokens["ada"])

    @property
    def eve(self) -> httpx.AsyncClient:
        return self.client(self.tokens["eve"])

    async def user(self, name: str, project: str, **more: Any) -> str:
        async with self.admin as http:
            await http.post("/v1/projects", json={"name": project})
            made = await http.post("/v1/users", json={"name": name, "projects": [project]})
            assert made.status_code == 201, made.text
            token = await http.post("/v1/tokens", json={"name": "t", "user": name, **more})
            assert token.status_code == 201, token.text
            self.tokens[name] = token.json()["secret"]
            return self.tokens[name]


Opens = Callable[..., Awaitable[World]]


@asynccontextmanager
async def opened(settings: Settings, client: Client | None, keys: Keys | None = None) -> AsyncIterator[World]:
    """An API process over these settings; the first one of a database makes what is first."""
    keys = keys or Keys(b"k" * 32)
    await migrate(settings.records_url)
    db = Database(settings.records_url)
    token_file = settings.home / "admin.token"
    await ensure_first(db, lambda token: void(token_file.write_text(token)))
    cloud_id = await register_cloud(db, "local", Provider.LOCAL, CAN)
    assert cloud_id is not None
    bucket = LocalBucket(settings.home / "bucket", "http://127.0.0.1:9", keys.bucket_key())
    vendors = InstalledVendors(settings, keys)
    app = create_app(settings, buckets={cloud_id: bucket}, vendors=vendors, temporal=client, keys=keys)
    async with app.router.lifespan_context(app):
        yield World(app, db, keys, settings, bucket, cloud_id, token_file.read_text())
    await db.dispose()


def void(_: object) -> None:
    return None


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, task_queue=uuid.uuid4().hex)


@pytest.fixture
async def world(settings: Settings, temporal: Client) -> AsyncIterator[World]:
    async with opened(settings, temporal) as w:
        await w.user("ada", "team")
        await w.user("eve", "other")
        yield w


@pytest.fixture
async def absent() -> Client:
    """A client of a Temporal server that is not there."""
    return await Client.connect("127.0.0.1:1", lazy=True, data_converter=pydantic_data_converter)
