"""Real Serve under a real agent, with the gate in its proxy: one head for all tests here, in the order in which they
stand. Each begins with what the one before left deployed."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import json
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest

from heliostat.models.agents import ServeStatus, ServeTraffic
from tests.agent.conftest import Nodes, namespaces_work, until
from tests.agent.control_plane import ControlPlane

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]

TOKEN = "t0ken-of-the-service"
GATE = {"enabled": True, "hashes": [hashlib.sha256(TOKEN.encode()).hexdigest()]}
SECRET = "s3cr3t-value-of-the-user"
CODE = """
import asyncio, os
from ray import serve

{first}

@serve.deployment(name="{name}", num_replicas=1, ray_actor_options={{"num_cpus": 0.1}}, graceful_shutdown_timeout_s=2)
class Model:
    def __init__(self):
        self.greeting = "none"
        {init}

    def reconfigure(self, config):
        self.greeting = config.get("greeting", "none")

    async def __call__(self, request):
        await asyncio.sleep(float(request.query_params.get("sleep", 0)))
        return {{"text": "{text}", "pid": os.getpid(), "greeting": self.greeting}}

app = Model.bind()
"""

RPC = "from ray.serve.generated.serve_pb2_grpc import add_UserDefinedServiceServicer_to_server as add"


class Load:
    """Asks again and again, each time over a connection of its own, until ``stop``."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._end = threading.Event()
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(0.03):
            try:
                status, _, body = self._service.ask("/")
            except (OSError, http.client.HTTPException) as error:
                self.failures.append(repr(error))
            else:
                if status == 200:
                    self.answers.append((status, json.loads(body)))
                else:
                    self.failures.append(f"{status} {body!r}")

    def stop(self) -> None:
        self._end.set()
        self._thread.join(30)


class Service:
    def __init__(self, plane: ControlPlane, nodes: Nodes) -> None:
        self.plane = plane
        self.address = ""
        self.began = time.monotonic()
        self.head = nodes.start(
            "nd_head", isolate=namespaces_work(), service_id="svc_1", resources={"CPU": 2},
            constants={"serve_probe_pause_s": 0.05},
        )  # fmt: skip
        plane.fact("ray_ready", 120)

    def package(self, text: str, name: str = "Model", first: str = "", init: str = "") -> dict[str, str]:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as z:
            # with a date of its own: the same code must be the same package
            z.writestr(zipfile.ZipInfo("pkg/empty/x"), "")
            z.writestr(zipfile.ZipInfo("pkg/rpc.py"), RPC)
            z.writestr(zipfile.ZipInfo("pkg/served.py"), CODE.format(text=text, name=name, first=first, init=init))
        sha256 = hashlib.sha256(data.getvalue()).hexdigest()
        self.plane.bucket[f"uploads/{sha256}"] = data.getvalue()
        return {"url": f"{self.plane.url}/bucket/uploads/{sha256}", "sha256": sha256}

    def deploy(self, version: str, package: dict[str, str], target_capacity: float | None = None, **app: Any) -> float:
        """Returns when Serve has taken it; the time that it took."""
        env = {"working_dir": package, "env_vars": {"SECRET": SECRET}}
        one = {"name": "default", "route_prefix": "/", "import_path": "served:app", "args": {}, "runtime_env": env}
        began = time.monotonic()
        answer = self.plane.do(
            "serve_deploy", 150, service_id="svc_1", version_id=version, deploy=f"dp_{version}", gate=GATE,
            target_capacity=target_capacity,
            config={"applications": [one | app], "grpc_options": {"grpc_servicer_functions": ["rpc:add"]}},
        )  # fmt: skip
        assert answer["ok"], answer
        self.address = answer["result"]["http"]
        return time.monotonic() - began

    def told(self, version: str, timeout_s: float = 120, **what: Any) -> ServeStatus:
        fact = self.plane.fact("serve", timeout_s, version_id=version, **what)
        return ServeStatus.model_validate(fact["data"])

    def ask(self, path: str, token: str | None = TOKEN, timeout_s: float = 30) -> tuple[int, str | None, bytes]:
        """Status, version and body."""
        connection = http.client.HTTPConnection(self.address, timeout=timeout_s)
        with contextlib.closing(connection):
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
            answer = connection.getresponse()
            return answer.status, answer.getheader("X-Heliostat-Version"), answer.read()

    def probe(self, version: str, give_up_s: float = 60) -> dict[str, Any]:
        answer = self.plane.do(
            "serve_probe", 90, url=f"http://{self.address}", cluster_id="cl_1", version_id=version, give_up_s=give_up_s,
            probes=[{"application": "default", "path": "/", "method": "GET", "timeout_s": 10}],
        )  # fmt: skip
        assert answer["ok"], answer
        return dict(answer["result"])


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    plane = ControlPlane()
    with tempfile.TemporaryDirectory(prefix="agent-serve-", ignore_cleanup_errors=True) as folder:
        nodes = Nodes(plane, Path(folder))
        try:
            yield Service(plane, nodes)
        finally:
            nodes.close()
            plane.close()


def test_the_first_deploy_starts_serve_and_answers_behind_the_gate(service: Service) -> None:
    assert (service.head.folder / "provider" / "heliostat_serve_gate" / "__init__.py").exists()
    seen: list[tuple[float, str, Any]] = []
    done = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        while not done.wait(0.05):
            if service.address:
                for path in ("/-/healthz", "/"):
                    try:
                        seen.append((time.monotonic() - began, path, service.ask(path)[0]))
                    except OSError as error:
                        seen.append((time.monotonic() - began, path, type(error).__name__))

    service.address = f"{service.head.ip}:{port_of(service)}"
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    took = service.deploy("sv_1", service.package("one"))
    status = service.told("sv_1", healthy=True)
    healthy = time.monotonic() - began
    assert service.probe("sv_1")["healthy"] is True
    done.set()
    watcher.join(10)
    steps = [s for i, s in enumerate(seen) if s[1:] not in [t[1:] for t in seen[:i]]]
    print(f"PUT {took:.2f} s, healthy told {healthy:.2f} s, first seen: {[(round(t, 2), p, s) for t, p, s in steps]}")
    assert status.http == service.address
    assert status.applications["default"].deployments["Model"].replicas == 1
    code, version, body = service.ask("/")
    assert (code, version, json.loads(body)["text"]) == (200, "sv_1", "one")
    assert service.ask("/", token=None)[0] == 401
    assert service.ask("/", token="wrong")[0] == 403
    assert service.ask("/-/healthz", token=None)[0] == 200
    reports = service.plane.nodes["nd_head"]["reports"]
    report = service.plane.wait(lambda: (told := reports[-1].get("serve")) and told["refused"] >= 2 and told)
    traffic = ServeTraffic.model_validate(report)
    assert (traffic.version_id, traffic.alive, traffic.draining) == ("sv_1", True, False)
    assert traffic.requests >= 1
    assert traffic.probes >= 3
    assert service.plane.fact("activity", activity="busy")["data"]["reason"] == "Serve applications: default"


def port_of(service: Service) -> int:
    """Of the proxy, before anything is deployed."""
    for pid in service.head.marked():
        env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for entry in env:
            if entry.startswith(b"HELIOSTAT_SERVE_PORTS="):
                return int(entry.partition(b"=")[2].split(b",")[0])
    raise AssertionError("no process of Ray has the ports")


def test_grpc_finds_its_servicers_in_the_package_and_asks_for_the_token(service: Service) -> None:
    address = service.told("sv_1", healthy=True).grpc
    assert address
    call = "/ray.serve.RayServeAPIService/ListApplications"
    with grpc.insecure_channel(address) as channel:
        list_applications = channel.unary_unary(call)
        with pytest.raises(grpc.RpcError) as refused:
            list_applications(b"", timeout=20)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        answer = list_applications(b"", timeout=20, metadata=[("authorization", f"Bearer {TOKEN}")])
        assert b"default" in answer


def test_new_configuration_alone_keeps_the_replica(service: Service) -> None:
    pid = json.loads(service.ask("/")[2])["pid"]
    load = Load(service)
    began = time.monotonic()
    service.deploy("sv_2", service.package("one"), deployments=[{"name": "Model", "user_config": {"greeting": "hi"}}])
    service.told("sv_2", healthy=True)
    until(lambda: json.loads(service.ask("/")[2])["greeting"] == "hi", 30)
    print(f"user_config {time.monotonic() - began:.2f} s")
    load.stop()
    assert load.failures == []
    assert {a["pid"] for _, a in load.answers} == {pid}


def test_an_import_error_in_place_leaves_the_good_replica_alone(service: Service) -> None:
    load = Load(service)
    began = time.monotonic()
    service.deploy("sv_3", service.package("three", first="import no_such_module"))
    status = service.told("sv_3", failed=True)
    print(f"import error told after {time.monotonic() - began:.2f} s: {status.message}")
    assert "No module named 'no_such_module'" in status.message
    assert not status.healthy
    assert service.probe("sv_3")["healthy"] is False
    load.stop()
    assert load.failures == []
    assert {a["text"] for _, a in load.answers} == {"one"}
    assert service.ask("/")[1] == "sv_2"


def test_a_crash_at_start_in_place_leaves_the_good_replica_alone(service: Service) -> None:
    load = Load(service)
    began = time.monotonic()
    service.deploy("sv_4", service.package("four", init="raise ValueError('bad ' + os.environ['SECRET'])"))
    status = service.told("sv_4", failed=True)
    print(f"crash at start told after {time.monotonic() - began:.2f} s: {status.message}")
    assert "ValueError: bad ********" in status.message
    assert SECRET not in json.dumps(service.plane.facts)
    load.stop()
    assert load.failures == []
    assert {a["text"] for _, a in load.answers} == {"one"}


def test_good_code_in_place_after_broken_ones_leaves_no_gap(service: Service) -> None:
    load = Load(service)
    began = time.monotonic()
    service.deploy("sv_5", service.package("five"))
    service.told("sv_5", healthy=True)
    print(f"good code {time.monotonic() - began:.2f} s")
    assert service.probe("sv_5")["healthy"] is True
    load.stop()
    assert load.failures == []
    assert [a["text"] for _, a in load.answers][-1] == "five"
    assert service.ask("/")[1] == "sv_5"


def test_a_renamed_deployment_in_place_is_no_failure(service: Service) -> None:
    load = Load(service)
    began = time.monotonic()
    service.deploy("sv_6", service.package("six", name="Renamed"))
    status = service.told("sv_6", healthy=True)
    print(f"renamed {time.monotonic() - began:.2f} s")
    assert list(status.applications["default"].deployments) == ["Renamed"]
    assert not [f for f in service.plane.facts if f["kind"] == "serve" and f["data"]["version_id"] == "sv_6"
                and f["data"]["failed"]]  # fmt: skip
    assert service.probe("sv_6")["healthy"] is True
    load.stop()
    print(f"renamed: {len(load.failures)} failures of {len(load.answers)}: {load.failures[:3]}")
    assert load.failures == []


def test_target_capacity_is_a_share_of_the_replicas(service: Service) -> None:
    three = [{"name": "Renamed", "num_replicas": 3}]
    service.deploy("sv_7", service.package("six", name="Renamed"), deployments=three)
    until(lambda: service.told("sv_7", healthy=True), 60)
    for percent, wanted in ((50.0, 2), (1.0, 1)):
        version = f"sv_7_{percent:.0f}"
        service.deploy(version, service.package("six", name="Renamed"), percent, deployments=three)
        status = service.told(version, healthy=True)
        count = status.applications["default"].deployments["Renamed"].replicas
        print(f"3 replicas at {percent} %: {count}")
        assert count == wanted
    service.deploy("sv_8", service.package("six", name="Renamed"), 50, deployments=[{"name": "Renamed"}])
    status = service.told("sv_8", healthy=True)
    print(f"1 replica at 50 %: {status.applications['default'].deployments['Renamed'].replicas}")
    assert status.applications["default"].deployments["Renamed"].replicas == 1


def test_another_set_of_tokens_holds_when_the_command_is_answered(service: Service) -> None:
    fresh = {"enabled": True, "hashes": [*GATE["hashes"], hashlib.sha256(b"second").hexdigest()]}
    began = time.monotonic()
    assert service.plane.do("serve_gate", gate=fresh, draining=False)["ok"]
    print(f"gate {time.monotonic() - began:.2f} s")
    assert service.ask("/", token="second")[0] == 200
    assert service.plane.do("serve_gate", gate=GATE, draining=False)["ok"]
    assert service.ask("/", token="second")[0] == 403


def test_a_drain_waits_for_a_request_and_closes_what_is_kept_alive(service: Service) -> None:
    kept = http.client.HTTPConnection(service.address, timeout=30)
    kept.request("GET", "/", headers={"Authorization": f"Bearer {TOKEN}"})
    kept.getresponse().read()
    slow = threading.Thread(target=lambda: service.ask("/?sleep=3"), daemon=True)
    slow.start()
    service.plane.wait(lambda: service.plane.nodes["nd_head"]["reports"][-1]["serve"]["ongoing"] >= 1)
    drain = service.plane.command("serve_drain", timeout_s=60)
    time.sleep(0.5)
    kept.request("GET", "/", headers={"Authorization": f"Bearer {TOKEN}"})
    answer = kept.getresponse()
    answer.read()
    assert answer.getheader("Connection") == "close"
    assert service.plane.commands[drain]["result"] is None
    slow.join(30)
    result = service.plane.result(drain)["result"]
    print(f"drain {result}")
    assert (result["drained"], result["ongoing"], result["connections"]) == (True, 0, 0)
    assert service.plane.do("serve_gate", gate=GATE, draining=False)["ok"]
    assert service.ask("/")[0] == 200


def test_the_head_ends_soon_and_leaves_nothing(service: Service) -> None:
    began = time.monotonic()
    service.head.end(60)
    took = time.monotonic() - began
    print(f"end {took:.2f} s")
    until(lambda: not service.head.marked(), 20, "nothing left")
    assert took < 20
