"""Probes by gRPC: Serve's own gRPC server with our gate in it, alone and behind a real load balancer."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ssl
import sys
import urllib.parse
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.constants import Constants
from agent.gate import grpc as gate_grpc
from agent.gate import policy as gate_policy
from agent.gate.policy import GateFile
from agent.gate.stats import Stats
from agent.serve import probe_grpc
from agent.serve.probe import Prober
from clouds.contract.balancer import Backend
from clouds.local.balancer.traefik import LocalBalancer
from tests.agent.conftest import held_port
from tests.agent.gate.support import PROBE, GateWriter, sha256
from tests.clouds.balancer_support import SERVICE, spec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
WAIT_S = 20.0
CLUSTER = "cl_1"


class Served:
    """What Serve's proxy has been asked stands in ``seen``; it answers with ``code`` and ``applications``."""

    def __init__(self, port: int, writer: GateWriter, stats: Stats) -> None:
        self.port, self.writer, self.stats = port, writer, stats
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.applications = ["default"]
        self.code = "OK"
        self.hold = False

    def factory(self, service_method: str, streaming_type: Any) -> Any:
        import grpc
        from ray.serve.generated.serve_pb2 import ListApplicationsResponse

        async def unary(request: Any, context: Any) -> bytes:
            self.seen.append((service_method, dict(context.invocation_metadata())))
            if self.hold:
                await asyncio.sleep(WAIT_S)
            context.set_code(grpc.StatusCode[self.code])
            context.set_details(f"says the proxy of {PROBE.decode()}")
            return bytes(ListApplicationsResponse(application_names=self.applications).SerializeToString())

        return unary

    async def probe(
        self, url: str = "", *, good: int = 2, give_up_s: float = WAIT_S, health: Any = None, **how: Any
    ) -> dict[str, Any]:
        """``health``: Serve's status; healthy unless given."""
        args = {
            "url": url or f"http://127.0.0.1:{self.port}", "cluster_id": CLUSTER, "version_id": "sv_1",
            "give_up_s": give_up_s, "probes": [{"application": "gRPC", "grpc": True, "timeout_s": 10} | how],
        }  # fmt: skip
        constants = Constants(serve_probe_pause_s=0.01, serve_probes_good=good)
        health = health or (lambda: ("sv_1", True, False, ""))
        return await asyncio.to_thread(Prober(args, PROBE.decode(), constants, health, list).run)

    async def refusal(self, url: str = "", **how: Any) -> str:
        """What is said of the only call, which fails: at the second poll Serve has given it up."""
        given_up = iter([False, True])
        found = await self.probe(url, health=lambda: ("sv_1", True, next(given_up), ""), **how)
        assert found["healthy"] is False
        return str(found["applications"]["gRPC"]["message"])


@pytest.fixture
async def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    from ray.serve._private.grpc_util import start_grpc_server

    writer, stats = GateWriter(tmp_path / "gate.json"), Stats()
    monkeypatch.setattr(gate_policy, "REFRESH_S", 0.0)  # each call sees the file as a test has just written it
    monkeypatch.setattr(gate_grpc, "GATE_FILE", GateFile(str(writer.path)))
    monkeypatch.setattr(gate_grpc, "STATS", stats)
    with held_port() as port:
        served = Served(port, writer, stats)
        functions = [gate_grpc.guard_grpc]
        options = SimpleNamespace(port=port, grpc_servicer_func_callable=functions, enable_reflection=False)
        task, server = await start_grpc_server(
            served.factory, options, event_loop=asyncio.get_running_loop(), enable_so_reuseport=True
        )
        try:
            yield served
        finally:
            await server.stop(None)
            await asyncio.wait_for(task, WAIT_S)


@contextlib.contextmanager
def balanced(home: Path, port: int, **options: Any) -> Iterator[str]:
    """The URL of a load balancer before it, with one cluster more that has all the traffic and is dead."""
    balancer = LocalBalancer(home, **options)
    try:
        url = balancer.ensure(spec(grpc=True)).url
        mine = Backend(id=CLUSTER, version_id="sv_1", http="127.0.0.1:1", grpc=f"127.0.0.1:{port}", weight=0)
        other = Backend(id="cl_2", version_id="sv_2", http="127.0.0.1:1", grpc="127.0.0.1:1", weight=100)
        balancer.set_backends(SERVICE, 1, [mine, other])
        yield url
    finally:
        balancer.remove(SERVICE)


async def test_a_call_goes_through_the_load_balancer_to_this_very_head(served: Served, tmp_path: Path) -> None:
    with balanced(tmp_path / "home", served.port) as url:
        for each in (url, url.replace("http:", "https:") + "/"):
            served.seen.clear()
            found = await served.probe(each)
            assert found["healthy"] is True, found
            assert found["applications"]["gRPC"]["status"] == 0
            assert found["message"] == ""
            assert [method for method, _ in served.seen] == [probe_grpc.METHOD] * 2
            metadata = served.seen[0][1]
            assert metadata["x-heliostat-backend"] == CLUSTER
            assert "authorization" not in metadata, "the gate keeps the probe's token to itself"
        counted = served.stats.snapshot()
        assert (counted["probes"], counted["requests"], counted["refused"]) == (4, 0, 0)


@pytest.mark.long
async def test_what_is_no_good_answer_is_told_with_its_reason(served: Served) -> None:
    served.writer.write(version_id="sv_2")
    assert "gRPC OK came from version sv_2" in await served.refusal()
    served.writer.write(version_id="sv_1", probe_hash="0" * 64)
    assert "another head's gate" in await served.refusal()
    served.writer.path.unlink()
    assert "another server than this service's proxy" in await served.refusal()
    served.writer.write(probe_hash=sha256(PROBE))
    served.applications = []
    assert "has no application" in await served.refusal()
    served.applications, served.code = ["default"], "UNAVAILABLE"
    said = await served.refusal()
    assert "gRPC UNAVAILABLE: says the proxy of" in said
    assert PROBE.decode() not in said
    served.code, served.hold = "OK", True
    assert "no answer within 0.2 s" in await served.refusal(timeout_s=0.2)
    served.hold = False
    assert (await served.probe())["healthy"] is True
    assert "gRPC UNAVAILABLE came from another server" in await served.refusal("http://127.0.0.1:1")
    assert "the request failed" in await served.refusal("https://127.0.0.1:1")


async def test_a_cluster_without_a_backend_is_not_taken_for_another(served: Served, tmp_path: Path) -> None:
    with balanced(tmp_path / "home", served.port) as url:
        LocalBalancer(tmp_path / "home").set_backends(SERVICE, 2, [])
        # UNAVAILABLE by the answer's 503, or UNKNOWN where its text comes in first: gRPC's own race.
        assert "came from another server than this service's proxy" in await served.refusal(url)
    assert served.seen == []


async def test_http_and_grpc_of_one_service_are_both_asked(served: Served) -> None:
    args = {
        "url": f"http://127.0.0.1:{served.port}", "cluster_id": CLUSTER, "version_id": "sv_1", "give_up_s": WAIT_S,
        "probes": [{"application": "gRPC", "grpc": True}, {"application": "web", "path": "/", "timeout_s": 5}],
    }  # fmt: skip
    constants = Constants(serve_probe_pause_s=0.01, serve_probes_good=1)
    given_up = iter([False, True])
    prober = Prober(args, PROBE.decode(), constants, lambda: ("sv_1", True, next(given_up), ""), list)
    found = await asyncio.to_thread(prober.run)
    assert (found["healthy"], found["applications"]["gRPC"]["message"]) == (False, "")
    assert "the request failed" in found["applications"]["web"]["message"]


async def test_a_head_without_grpc_says_so_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    found = await served.probe(give_up_s=600)
    assert found["healthy"] is False
    assert "lacks the module grpc" in found["message"]


def issued(folder: Path, *names: str) -> tuple[Path, Path, Path]:
    """Files of a certificate that an authority has issued, of its key, and of the authority's own certificate."""
    now = datetime.datetime.now(datetime.UTC)

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def make(subject: str, key: ec.EllipticCurvePrivateKey, ca: ec.EllipticCurvePrivateKey, *extensions: Any) -> Path:
        builder = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named("authority"))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        path = folder / f"{subject}.pem"
        path.write_bytes(builder.sign(ca, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    ca, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = make("authority", ca, ca, (x509.BasicConstraints(ca=True, path_length=None), True))
    san = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
    leaf = make("leaf", key, ca, (san, False))
    key_file = folder / "key.pem"
    plain = serialization.NoEncryption()
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key_file.write_bytes(key.private_bytes(pem, form, plain))
    return leaf, key_file, authority


async def test_an_operators_certificate_is_checked_for_a_name_and_not_for_an_address(
    served: Served, tmp_path: Path
) -> None:
    leaf, key, authority = issued(tmp_path, "*.example.org", "localhost")
    with balanced(tmp_path / "home", served.port, cert_file=leaf, key_file=key) as url:
        assert url.startswith("https://127.0.0.1:")
        assert (await served.probe(url))["healthy"] is True
        by_name = urllib.parse.urlsplit(url.replace("127.0.0.1", "localhost"))
        metadata = {"X-Heliostat-Backend": CLUSTER, "Authorization": f"Bearer {PROBE.decode()}"}

        def ask(context: ssl.SSLContext) -> probe_grpc.Answer:
            return probe_grpc.ask(by_name, metadata, WAIT_S, context)

        known = ssl.create_default_context(cafile=str(authority))
        assert (await asyncio.to_thread(ask, known)).code == "OK"
        with pytest.raises(ssl.SSLCertVerificationError):
            await asyncio.to_thread(ask, ssl.create_default_context())
