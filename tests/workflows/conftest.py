from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from temporalio.client import Client

from tests.workflows.service_world import ServiceWorld, make_service_world
from tests.workflows.world import World, make_world, temporal_server


@pytest.fixture(scope="session")
async def temporal() -> AsyncIterator[Client]:
    async with temporal_server() as client:
        yield client


@pytest.fixture
async def world(temporal: Client, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """In Temporal's sandbox, which costs half a second a test, where the module says ``SANDBOXED``; every workflow
    runs in it when its saved histories are replayed."""
    async with make_world(temporal, tmp_path, sandboxed=getattr(request.module, "SANDBOXED", False)) as w:
        yield w


@pytest.fixture
async def services(temporal: Client, tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with make_service_world(temporal, tmp_path) as w:
        yield w
