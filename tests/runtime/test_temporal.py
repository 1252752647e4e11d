"""Connecting to Temporal, and what its namespace gets, on a real server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.testing import WorkflowEnvironment

from heliostat.errors import Unavailable
from runtime.home import free_port
from runtime.messages import MONITOR_ID, SEARCH_ATTRIBUTES, SWEEP_SCHEDULE_ID
from runtime.settings import Settings
from runtime.temporal import connect, ensure_namespace_ready


@pytest.fixture(scope="module")
async def address() -> AsyncIterator[str]:
    env = await WorkflowEnvironment.start_local(
        dev_server_existing_path=str(Path(sys.executable).with_name("temporal")), dev_server_log_level="error"
    )
    yield env.client.service_client.config.target_host
    await env.shutdown()


@pytest.fixture
async def client(address: str, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("TEMPORAL_ADDRESS", address)
    return await connect(Settings(temporal_port=1), timeout_s=10)


async def test_the_environment_says_where_temporal_is(client: Client) -> None:
    assert (await client.count_workflows()).count >= 0


async def test_without_it_the_embedded_one_is_meant(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPORAL_ADDRESS", raising=False)
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", "/dev/null")
    client = await connect(Settings(temporal_port=int(address.rpartition(":")[2])), timeout_s=10)
    assert client.namespace == "default"


async def test_an_absent_server_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("TEMPORAL_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(Unavailable, match=f"Temporal at 127.0.0.1:{port} can't be reached") as raised:
        await connect(Settings(), timeout_s=0.3)
    assert "TEMPORAL_ADDRESS" in raised.value.remedy


async def test_a_lazy_client_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPORAL_ADDRESS", f"127.0.0.1:{free_port()}")
    await connect(Settings(), lazy=True, timeout_s=0)


async def test_the_namespace_is_made_ready_and_again(client: Client) -> None:
    settings = Settings(sweep_interval_s=300, task_queue="q1")
    for _ in range(2):
        await ensure_namespace_ready(client, settings)
    listed = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace)
    )
    assert {key.name for key in SEARCH_ATTRIBUTES} <= set(listed.custom_attributes)
    monitor = await client.get_workflow_handle(MONITOR_ID).describe()
    assert (monitor.workflow_type, monitor.task_queue) == ("MonitorWorkflow", "q1")
    schedule = (await client.get_schedule_handle(SWEEP_SCHEDULE_ID).describe()).schedule
    assert schedule.spec.intervals[0].every == timedelta(seconds=300)


async def test_a_changed_interval_is_taken_over_and_a_pause_is_kept(client: Client) -> None:
    await ensure_namespace_ready(client, Settings(sweep_interval_s=300))
    handle = client.get_schedule_handle(SWEEP_SCHEDULE_ID)
    await handle.pause(note="an operator looks at something")
    await ensure_namespace_ready(client, Settings(sweep_interval_s=60))
    schedule = (await handle.describe()).schedule
    assert schedule.spec.intervals[0].every == timedelta(seconds=60)
    assert schedule.state.paused
