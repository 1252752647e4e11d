"""Connecting to Temporal, and what its namespace gets, on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from temporalio.api.operatorservice.v1 import ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.service import OperatorService, RPCError, RPCStatusCode
from temporalio.testing import WorkflowEnvironment

from heliostat.errors import Unavailable
from heliostat.models.common import utcnow
from runtime.home import free_port
from runtime.messages.common import MONITOR_ID, SEARCH_ATTRIBUTES, SWEEP_SCHEDULE_ID
from runtime.settings import Settings
from runtime.temporal import connect, ensure_namespace_ready


@pytest.fixture(scope="module")
async def address() -> AsyncIterator[str]:
    env = await WorkflowEnvironment.start_local(
        dev_server_existing_path=str(Path(sys.executable).with_name("temporal")),
        dev_server_log_level="error",
        dev_server_startup_timeout=timedelta(seconds=60),  # 5 s by default, which three at once exceed
    )
    yield env.client.service_client.config.target_host
    await env.shutdown()


@pytest.fixture
async def client(address: str, monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.setenv("TEMPORAL_ADDRESS", address)
    return await connect(Settings(temporal_port=1), timeout_s=60)


async def test_the_environment_says_where_temporal_is(client: Client) -> None:
    assert (await client.count_workflows()).count >= 0


async def test_without_it_the_embedded_one_is_meant(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPORAL_ADDRESS", raising=False)
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", "/dev/null")
    client = await connect(Settings(temporal_port=int(address.rpartition(":")[2])), timeout_s=60)
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


async def test_where_nobody_may_list_search_attributes_only_missing_ones_stop_us(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Temporal Cloud."""

    async def denied(*_: object, **__: object) -> None:
        raise RPCError("no such service here", RPCStatusCode.UNIMPLEMENTED, b"")

    await ensure_namespace_ready(client, Settings())
    monkeypatch.setattr(OperatorService, "list_search_attributes", denied)
    await ensure_namespace_ready(client, Settings())
    unknown = SearchAttributeKey.for_keyword("HeliostatNobodyHasThis")
    monkeypatch.setattr("runtime.temporal.SEARCH_ATTRIBUTES", (*SEARCH_ATTRIBUTES, unknown))
    with pytest.raises(Unavailable, match="lacks search attributes") as raised:
        await ensure_namespace_ready(client, Settings())
    assert "attributes HeliostatNobodyHasThis by" in raised.value.remedy


async def test_a_changed_interval_is_taken_over_and_a_pause_is_kept(client: Client) -> None:
    await ensure_namespace_ready(client, Settings(sweep_interval_s=300))
    handle = client.get_schedule_handle(SWEEP_SCHEDULE_ID)
    await handle.pause(note="an operator looks at something")
    await ensure_namespace_ready(client, Settings(sweep_interval_s=60))
    schedule = (await handle.describe()).schedule
    assert schedule.spec.intervals[0].every == timedelta(seconds=60)
    assert schedule.state.paused


@pytest.fixture
async def tls_address(address: str, tmp_path: Path) -> AsyncIterator[tuple[str, Path]]:
    """The same server behind TLS, as Temporal Cloud is, and the certificate to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "temporal.test")])
    now = utcnow()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("temporal.test")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, secret = tmp_path / "cert.pem", tmp_path / "key.pem"
    chain.write_bytes(certificate.public_bytes(Encoding.PEM))
    secret.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, secret)
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                target.write(data)
                await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", chain
    server.close()


async def test_tls_and_api_key_come_by_configuration(
    tls_address: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, chain = tls_address
    monkeypatch.setenv("TEMPORAL_ADDRESS", address)
    monkeypatch.setenv("TEMPORAL_NAMESPACE", "default")
    monkeypatch.setenv("TEMPORAL_TLS", "true")
    monkeypatch.setenv("TEMPORAL_TLS_SERVER_NAME", "temporal.test")
    with pytest.raises(Unavailable, match="can't be reached"):
        await connect(Settings(), timeout_s=0.3)  # nobody vouches for that certificate
    monkeypatch.setenv("TEMPORAL_TLS_SERVER_CA_CERT_PATH", str(chain))
    monkeypatch.setenv("TEMPORAL_API_KEY", "an-api-key")
    client = await connect(Settings(), timeout_s=60)
    assert (await client.count_workflows()).count >= 0
    assert client.api_key == "an-api-key"


async def test_a_profile_of_a_file_is_found(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "temporal.toml"
    file.write_text(f'[profile.ours]\naddress = "{address}"\nnamespace = "default"\n')
    monkeypatch.delenv("TEMPORAL_ADDRESS", raising=False)
    monkeypatch.setenv("TEMPORAL_CONFIG_FILE", str(file))
    monkeypatch.setenv("TEMPORAL_PROFILE", "ours")
    client = await connect(Settings(temporal_port=1), timeout_s=60)
    assert client.service_client.config.target_host == address
