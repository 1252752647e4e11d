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
async def world(temporal: Client, tmp_path: Path) -> AsyncIterator[World]:
    async with make_world(temporal, tmp_path) as w:
        yield w


@pytest.fixture
async def services(temporal: Client, tmp_path: Path) -> AsyncIterator[ServiceWorld]:
    async with make_service_world(temporal, tmp_path) as w:
        yield w
