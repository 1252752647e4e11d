"""The recorder that stands for services' workflows, at work."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from temporalio.client import Client
from temporalio.worker import Worker

from tests.api.conftest import World
from tests.api.services.support import Recorder


@pytest.fixture
async def worker(world: World, temporal: Client) -> AsyncIterator[None]:
    async with Worker(temporal, task_queue=world.settings.task_queue, workflows=[Recorder]):
        yield
