"""What the local load balancer carries, and where it stands."""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import httpx
import pytest
from websockets.sync.client import connect

from clouds.contract.balancer import Backend
from clouds.contract.errors import BadConfig, QuotaExceeded
from clouds.local.balancer.config import MAX_REPLAYED_BODY, TRIES
from clouds.local.balancer.tls import self_signed
from clouds.local.balancer.traefik import LocalBalancer
from heliostat.models.services import BACKEND_HEADER
from runtime.home import Home
from runtime.keys import load_or_create
from tests.clouds.balancer_support import SERVICE, LocalWorld, Process, local_world, processes, spec
from tests.clouds.support import OURS, ROOT, eventually


@pytest.fixture(scope="module")
def backends() -> Iterator[dict[str, Process]]:
    with processes("cl_a", "cl_b") as started:
        yield {one.name: one for one in started}


@pytest.fixture(scope="module")
def shared(backends: dict[str, Process], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalWorld]:
    """One endpoint with the backend cl_a for all tests that only send requests."""
    with local_world(tmp_path_factory.mktemp("home"), backends) as world:
        world.balancer.ensure(spec())
        world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a")])
        yield world


@pytest.fixture
def world(backends: dict[str, Process], tmp_path: Path) -> Iterator[LocalWorld]:
    with local_world(tmp_path, backends) as local:
        yield local


def test_a_stream_is_not_held_back(shared: LocalWorld) -> None:
    def took_s() -> float:
        """From the first piece to the last."""
        arrived = []
        with shared.client.stream("GET", f"{shared.url}/stream") as answer:
            for piece in answer.iter_raw():
                arrived.append((time.monotonic(), piece))
        assert b"".join(piece for _, piece in arrived) == b"0\n1\n2\n3\n4\n"
        return arrived[-1][0] - arrived[0][0]

    # Where we are late to read, the first piece comes with later ones: one that is held back comes so each time.
    assert any(took_s() > 0.4 for _ in range(5)), "the backend takes 0.8 s from its first piece to its last"


def test_websockets_pass(shared: LocalWorld) -> None:
    with connect(shared.url.replace("http:", "ws:") + "/ws") as ws:
        for text in ("one", "two"):
            ws.send(text)
            assert ws.recv(timeout=20) == f"cl_a {text}"


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_large_bodies_pass(shared: LocalWorld, method: str) -> None:
    size = 20_000_000
    assert shared.client.request(method, f"{shared.url}/up", content=bytes(size)).text == f"cl_a {method} /up {size}"
    pieces = (b"x" * 100_000 for _ in range(size // 100_000))  # chunked: nobody knows the length before
    assert shared.client.request(method, f"{shared.url}/up", content=pieces).text == f"cl_a {method} /up {size}"
    body = bytes(MAX_REPLAYED_BODY)
    assert shared.client.request(method, f"{shared.url}/up", content=body).text == f"cl_a {method} /up {len(body)}"


def test_a_path_arrives_as_it_was_sent(shared: LocalWorld) -> None:
    connection = http.client.HTTPConnection(shared.url.removeprefix("http://"), timeout=20)
    connection.request("GET", "/a%2Fb//c/../d%3B%25?x=1;2&y=%2F")
    assert connection.getresponse().read() == b"cl_a GET /a%2Fb//c/../d%3B%25 0"
    connection.close()


def test_an_applications_own_502_is_answered_after_few_tries(shared: LocalWorld) -> None:
    def tried() -> int:
        (counters,) = shared.balancer.counters(SERVICE)
        return counters.requests.get("502", 0)

    before = tried()
    assert shared.request(status=502) == (502, "cl_a")
    assert tried() - before == TRIES
    assert shared.client.post(f"{shared.url}/status?502").status_code == 502
    assert tried() - before == TRIES + 1, "a POST is not repeated"


def test_http2_without_tls(shared: LocalWorld) -> None:
    """By prior knowledge, as gRPC clients speak it: answered by frames, SETTINGS first."""
    host, _, port = shared.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        assert raw.recv(9)[3] == 4


def test_tls_works_on_the_same_port_with_a_certificate_of_our_own(shared: LocalWorld) -> None:
    url = shared.url.replace("http:", "https:")
    context = ssl.create_default_context(cafile=str(shared.home / "balancers" / "tls.crt"))
    assert httpx.get(f"{url}/status?200", verify=context).headers["x-backend"] == "cl_a"
    with httpx.Client(verify=False) as client:
        assert client.get(f"{url}/x", headers={BACKEND_HEADER: "cl_z"}).status_code == 503
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/status?200")
    assert stat.S_IMODE((shared.home / "balancers" / "tls.key").stat().st_mode) == 0o600


def test_nobody_else_can_read_its_folder(shared: LocalWorld) -> None:
    for folder, _, names in os.walk(shared.home / "balancers"):
        assert stat.S_IMODE(Path(folder).stat().st_mode) == 0o700 or Path(folder).parent.name != "balancers"
        for name in names:
            assert not stat.S_IMODE((Path(folder) / name).stat().st_mode) & 0o022
    assert stat.S_IMODE(shared.folder.stat().st_mode) == 0o700


def test_it_is_no_part_of_the_stack(shared: LocalWorld) -> None:
    """`make down` and `make up` end what is: the parts, known by their environment and their session."""
    (traefik,), (keeper,) = shared.pids("traefik"), shared.pids("supervisor")
    for pid in (traefik, keeper):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"HELIOSTAT_PART=" not in environ
        assert b"PROXY" not in environ.upper(), "Traefik would send requests to backends through it"
        assert os.getsid(pid) not in (os.getsid(0), 0)
    assert Home(shared.home).processes() == {}
    assert Path(f"/proc/{keeper}/cmdline").read_bytes().split(b"\0")[-3:-1] == [
        str(shared.folder).encode(),
        str(Path(sys.executable).with_name("traefik")).encode(),
    ]


@pytest.fixture
def grpc_backend() -> Iterator[int]:
    """Echoes: one answer to ``/echo/One``, each of them to ``/echo/Many``. Gives its port."""

    class Echo(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            if call.method == "/echo/One":
                return grpc.unary_unary_rpc_method_handler(lambda request, _context: request)
            if call.method == "/echo/Many":
                return grpc.stream_stream_rpc_method_handler(lambda requests, _context: requests)
            return None

    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[Echo()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


def test_grpc_goes_to_the_grpc_addresses(world: LocalWorld, grpc_backend: int) -> None:
    endpoint = world.balancer.ensure(spec(grpc=True))
    address = endpoint.url.removeprefix("http://")
    with grpc.insecure_channel(address) as channel:
        one = channel.unary_unary("/echo/One")
        with pytest.raises(grpc.RpcError) as none_yet:
            one(b"x", timeout=20)
        assert none_yet.value.code() == grpc.StatusCode.UNAVAILABLE
        b = world.backend("cl_b").model_copy(update={"grpc": f"127.0.0.1:{grpc_backend}"})
        world.balancer.set_backends(
            SERVICE, 1, [world.backend("cl_a", "sv_1", 100), b.model_copy(update={"version_id": "sv_2", "weight": 1})]
        )
        assert [one(b"%d" % n, timeout=20) for n in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert list(channel.stream_stream("/echo/Many")(iter([b"a", b"b", b"c"]), timeout=20)) == [b"a", b"b", b"c"]
        assert one(b"x", timeout=20, metadata=[(BACKEND_HEADER.lower(), "cl_b")]) == b"x"
        with pytest.raises(grpc.RpcError) as has_none:
            one(b"x", timeout=20, metadata=[(BACKEND_HEADER.lower(), "cl_a")])
        assert has_none.value.code() == grpc.StatusCode.UNAVAILABLE
    assert world.request({BACKEND_HEADER: "cl_b"}) == (200, "cl_b"), "HTTP of the same cluster stays HTTP"
    assert sum(world.balancer.counters(SERVICE)[1].requests.values()) == 8
    certificate = (world.home / "balancers" / "tls.crt").read_bytes()
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(certificate)) as channel:
        assert channel.unary_unary("/echo/One")(b"tls", timeout=20) == b"tls"
    # With a second one its health counts, which is that of its HTTP port: the gRPC one wants a token.
    gone = world.backend("cl_a", "sv_3", 50).model_copy(update={"grpc": f"127.0.0.1:{grpc_backend}"})
    world.balancer.set_backends(SERVICE, 2, [b.model_copy(update={"version_id": "sv_2", "weight": 50}), gone])
    world.set_up("cl_a", False)
    before = sum(world.balancer.counters(SERVICE)[1].requests.values())
    with grpc.insecure_channel(address) as channel:
        one = channel.unary_unary("/echo/One")

        def left_out() -> bool:
            nonlocal before
            assert [one(b"x", timeout=20) for _ in range(10)] == [b"x"] * 10
            count = sum(world.balancer.counters(SERVICE)[1].requests.values())
            same, before = count == before, count
            return same

        eventually(left_out)


def test_the_only_backend_keeps_its_traffic_whatever_its_health_says(world: LocalWorld) -> None:
    """On a busy machine a check may be late; nobody else could take the traffic."""
    world.balancer.ensure(spec())
    world.balancer.set_backends(SERVICE, 1, [world.backend("cl_a"), world.backend("cl_b", "sv_2", 0)])
    world.backends["cl_a"].sicken(True)
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert world.request() == (200, "cl_a")


def test_an_operators_certificate(tmp_path: Path, backends: dict[str, Process]) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    self_signed(cert, key, ["lb.example"])
    home = tmp_path / "home"
    balancer = LocalBalancer(home, public_host="localhost", cert_file=cert, key_file=key)
    with local_world(home, backends):
        endpoint = balancer.ensure(spec())
        assert endpoint.url.startswith("https://localhost:")

        def shown() -> str:
            host, _, port = endpoint.url.removeprefix("https://").partition(":")
            return ssl.get_server_certificate((host, int(port)), timeout=20)

        assert shown() == cert.read_text()
        self_signed(tmp_path / "new.pem", tmp_path / "new.key", ["lb.example"])
        (tmp_path / "new.pem").replace(cert)
        (tmp_path / "new.key").replace(key)
        assert balancer.ensure(spec()) == endpoint
        assert shown() == cert.read_text(), "a renewed certificate is taken over without a restart"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"cert_file": "cert.pem"}, "Only one of"),
        ({"cert_file": "none.pem", "key_file": "key.pem"}, "No such file"),
        ({"cert_file": "bad.pem", "key_file": "key.pem"}, "cannot be read"),
        ({"cert_file": "cert.pem", "key_file": "other.key"}, "is not that of"),
    ],
)
def test_a_certificate_that_is_none_is_refused(tmp_path: Path, given: dict[str, str], says: str) -> None:
    self_signed(tmp_path / "cert.pem", tmp_path / "key.pem", [])
    self_signed(tmp_path / "other.pem", tmp_path / "other.key", [])
    (tmp_path / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    files = {name: tmp_path / file for name, file in given.items()}
    balancer = LocalBalancer(tmp_path / "home", cert_file=files.get("cert_file"), key_file=files.get("key_file"))
    with pytest.raises(BadConfig, match=says) as caught:
        balancer.ensure(spec())
    assert "HELIOSTAT_BALANCER_" in caught.value.remedy
    assert balancer.describe(SERVICE) is None


def test_ports_come_from_the_range_that_is_set(tmp_path: Path, backends: dict[str, Process]) -> None:
    with socket.socket() as taken, socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # free for who says so too, and nobody else's
        for one in (taken, free):
            one.bind(("127.0.0.1", 0))
        first, last = sorted((taken.getsockname()[1], free.getsockname()[1]))
        free_port = free.getsockname()[1]
        taken.listen()
        # The range between two ports may hold others that are free: only its ends are asked about.
        balancer = LocalBalancer(tmp_path, ports=f"{free_port}-{free_port}")
        with local_world(tmp_path, backends):
            assert balancer.ensure(spec()).url == f"http://127.0.0.1:{free_port}"
            with pytest.raises(QuotaExceeded, match=f"All ports of {free_port}-{free_port}"):
                balancer.ensure(spec("svc_2"))
            assert LocalBalancer(tmp_path, ports=f"{first}-{last}").ensure(spec()).url.endswith(str(free_port))
        port = taken.getsockname()[1]
        with pytest.raises(QuotaExceeded):
            LocalBalancer(tmp_path / "other", ports=f"{port}-{port}").ensure(spec())


def test_an_address_that_this_machine_has_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"192\.0\.2\.1") as caught:
        LocalBalancer(tmp_path, host="192.0.2.1").ensure(spec())
    assert "HELIOSTAT_BALANCER_HOST" in caught.value.remedy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"id": "a`)"}, "an invalid id"),
        ({"http": "nowhere"}, "no address"),
        ({"grpc": "http://x:1"}, "no address"),
        ({"id": "cl_b"}, "twice"),
        ({"weight": 7}, "weight"),
    ],
)
def test_backends_that_cannot_be_are_refused_and_change_nothing(
    shared: LocalWorld, change: dict[str, object], says: str
) -> None:
    good = Backend(id="cl_b", version_id="sv_2", http="127.0.0.1:1", weight=1)
    with pytest.raises(BadConfig, match=says):
        shared.balancer.set_backends(SERVICE, 2, [good, good.model_copy(update={"id": "cl_c"} | change)])
    assert shared.request() == (200, "cl_a")


@pytest.mark.parametrize("service_id", ["../svc", "", "a/b", "."])
def test_an_id_that_leads_elsewhere_is_refused(tmp_path: Path, service_id: str) -> None:
    with pytest.raises(BadConfig):
        LocalBalancer(tmp_path).ensure(spec(service_id))
    with pytest.raises(BadConfig):
        LocalBalancer(tmp_path).remove(service_id)


@pytest.mark.long
def test_a_cut_of_power_leaves_nothing(world: LocalWorld) -> None:
    mine = load_or_create(world.home, "").installation_id()
    world.balancer.ensure(spec(installation_id=mine))
    world.balancer.ensure(spec("svc_2", installation_id=OURS))

    def run(what: str) -> str:
        env = os.environ | {"HELIOSTAT_HOME": str(world.home)}
        return subprocess.run(
            [sys.executable, "-m", "clouds.local", what], cwd=ROOT, env=env, capture_output=True, text=True, check=True
        ).stdout

    assert run("list") == f"{SERVICE}\n"
    assert run("end") == f"{SERVICE}\n"
    assert run("list") == ""
    assert world.pids("traefik") == world.pids("supervisor") == []
    assert not world.folder.exists()
    assert world.balancer.list_owned(OURS) == ["svc_2"]
