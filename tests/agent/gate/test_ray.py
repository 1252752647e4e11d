"""The gate in Ray Serve's own proxies: one Ray with one application, over HTTP, a websocket and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from agent import gate as gate_package
from agent import processes
from heliostat.models.agents import ServeTraffic
from tests.agent.conftest import until
from tests.agent.gate.support import PROBE, TOKEN, GateWriter

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

WAIT_S = 60.0
BEARER = {"authorization": "Bearer " + TOKEN.decode()}
AS_PROBE = {"authorization": "Bearer " + PROBE.decode()}

ECHO = """
import grpc
from google.protobuf.wrappers_pb2 import StringValue

def add_echo(servicer, server):
    coders = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
    methods = {
        "Say": grpc.unary_unary_rpc_method_handler(servicer.Say, **coders),
        "Count": grpc.unary_stream_rpc_method_handler(servicer.Count, **coders),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    server.add_registered_method_handlers("test.Echo", methods)
"""

PROGRAM = """
import asyncio, os, signal, sys
import ray
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from google.protobuf.wrappers_pb2 import StringValue
from ray import serve

web, (temp, http, rpc) = FastAPI(), sys.argv[1:4]

@serve.deployment(ray_actor_options={"num_cpus": 0})
@serve.ingress(web)
class App:
    @web.get("/headers")
    async def headers(self, request: Request):
        return dict(request.headers)

    @web.get("/stream")
    async def stream(self):
        async def parts():
            for n in range(5):
                yield f"part {n};"
                await asyncio.sleep(0.05)
        return StreamingResponse(parts())

    @web.get("/status/{code}")
    async def status(self, code: int):
        async def parts():
            yield "bad "
            yield "answer"
        return StreamingResponse(parts(), status_code=code)

    @web.get("/slow")
    async def slow(self):
        await asyncio.sleep(60)

    @web.get("/crash")
    async def crash(self):
        os.kill(os.getpid(), signal.SIGKILL)

    @web.websocket("/chat")
    async def chat(self, socket: WebSocket):
        await socket.accept()
        while True:
            await socket.send_text(await socket.receive_text())

    async def Say(self, request):
        return StringValue(value=f"hello {request.value}")

    async def Count(self, request):
        for n in range(3):
            yield StringValue(value=f"{request.value} {n}")

ray.init(num_cpus=2, include_dashboard=False, _temp_dir=temp, object_store_memory=80_000_000, log_to_driver=False)
serve.start(
    proxy_location="HeadOnly",
    http_options={"host": "127.0.0.1", "port": int(http)},
    grpc_options={"port": int(rpc), "grpc_servicer_functions": ["heliostat_serve_gate.guard_grpc", "echo.add_echo"]},
)
serve.run(App.bind(), name="app")
print("READY", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


class Running:
    def __init__(self, folder: Path, temp: str) -> None:
        self.writer = GateWriter(folder / "gate.json")
        shutil.copytree(Path(gate_package.__file__).parent, folder / "heliostat_serve_gate")
        (folder / "echo.py").write_text(ECHO)
        (folder / "program.py").write_text(PROGRAM)
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            two.bind(("127.0.0.1", 0))
            self.http, self.grpc = one.getsockname()[1], two.getsockname()[1]
        self.mark = f"HELIOSTAT_TEST_GATE={folder}"
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HELIOSTAT_", "RAY_"))}
        env |= {
            "PYTHONPATH": str(folder), "HELIOSTAT_SERVE_GATE": str(self.writer.path), "RAY_USAGE_STATS_ENABLED": "0",
            "HELIOSTAT_SERVE_PORTS": f"{self.http},{self.grpc}", "HELIOSTAT_TEST_GATE": str(folder),
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "heliostat_serve_gate:middlewares",
        }  # fmt: skip
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(folder / "program.py"), temp, str(self.http), str(self.grpc)],
                cwd=folder, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            return b"READY" in self.log.read_bytes()

        until(is_ready, 120, "Serve does not come up")

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
        processes.kill([p for p in processes.with_environ(self.mark) if processes.alive(p)])

    def get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        """On a connection of its own."""
        with httpx.Client(trust_env=False, timeout=WAIT_S) as client:
            return client.get(f"http://127.0.0.1:{self.http}{path}", headers=headers or {})

    def statistics(self) -> dict[str, Any]:
        answer = self.get("/-/heliostat", AS_PROBE)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())


@pytest.fixture(scope="module")
def serve() -> Iterator[Running]:
    # Ray's sockets lie below its temporary folder, and their paths may have 107 characters only
    with tempfile.TemporaryDirectory(prefix="gate-", ignore_cleanup_errors=True) as folder:
        running = Running(Path(folder), f"{folder}/r")
        try:
            running.ready()
            yield running
        finally:
            running.close()


@pytest.mark.long
def test_http_through_serves_proxy(serve: Running) -> None:
    before = serve.statistics()
    assert serve.get("/-/healthz").text == "success"
    assert serve.get("/headers").status_code == 401
    assert serve.get("/headers", {"authorization": "Bearer x"}).status_code == 403
    assert serve.get("/-/routes").status_code == 401
    assert serve.get("/-/routes", BEARER).json() == {"/": "app"}
    answer = serve.get("/headers", BEARER)
    assert answer.json()["authorization"] == BEARER["authorization"]
    assert answer.headers.get_list("x-heliostat-version") == ["sv_1"]
    assert "authorization" not in serve.get("/headers", AS_PROBE).json()
    assert serve.get("/stream", BEARER).text == "".join(f"part {n};" for n in range(5))
    assert serve.get("/status/404", BEARER).status_code == 404
    assert serve.get("/status/500", BEARER).status_code == 500
    bad = serve.get("/status/502", BEARER)
    assert (bad.status_code, bad.text, bad.headers.get("transfer-encoding")) == (502, "bad answer", None)
    address = f"ws://127.0.0.1:{serve.http}/chat"
    with pytest.raises(InvalidStatus):
        connect(address, proxy=None)
    with connect(address, additional_headers=BEARER, proxy=None) as chat:
        chat.send("a")
        assert chat.recv(WAIT_S) == "a"
        counted = serve.statistics()
        assert (counted["ongoing"], counted["connections"]) == (1, 1)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(trust_env=False, timeout=1) as client:
        client.get(f"http://127.0.0.1:{serve.http}/slow", headers=BEARER)
    until(lambda: serve.statistics()["ongoing"] == 0, WAIT_S, "requests stay ongoing")
    counted = serve.statistics()
    traffic = ServeTraffic.model_validate(counted)
    assert traffic.requests - before["requests"] == 7
    assert traffic.errors - before["errors"] == 2
    assert (traffic.refused, traffic.probes, traffic.connections) == (4, 1, 0)
    assert sum(traffic.buckets) == traffic.requests == traffic.window_requests
    # a replica that dies while it answers
    assert serve.get("/crash", BEARER).status_code >= 500
    assert serve.statistics()["errors"] == counted["errors"] + 1
    until(lambda: serve.get("/headers", BEARER).status_code == 200, WAIT_S, "no new replica")
    serve.writer.write(draining=True, version_id="sv_2", revision=2)
    until(lambda: serve.statistics()["revision"] == 2, WAIT_S, "the gate is not told")
    for path, headers in (("/headers", BEARER), ("/stream", BEARER), ("/-/healthz", None), ("/headers", None)):
        answer = serve.get(path, headers)
        assert (answer.headers["connection"], answer.headers["x-heliostat-version"]) == ("close", "sv_2")
    with socket.create_connection(("127.0.0.1", serve.http), WAIT_S) as idle:
        until(lambda: serve.statistics()["connections"] == 0, WAIT_S, "an idle connection is kept")
        assert idle.recv(1) == b""
    serve.writer.path.write_text("")
    until(lambda: serve.get("/headers", BEARER).status_code == 503, WAIT_S, "an empty file does not close the gate")
    assert serve.get("/-/healthz").status_code == 200
    serve.writer.write(draining=False, version_id="sv_1", revision=3)
    until(lambda: serve.get("/headers", BEARER).status_code == 200, WAIT_S, "the gate does not open again")


@pytest.mark.long
async def test_grpc_through_serves_proxy(serve: Running) -> None:
    before = await asyncio.to_thread(serve.statistics)
    token = tuple(BEARER.items())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{serve.grpc}") as channel:
        encode, decode = StringValue.SerializeToString, StringValue.FromString
        say = channel.unary_unary("/test.Echo/Say", request_serializer=encode, response_deserializer=decode)
        count = channel.unary_stream("/test.Echo/Count", request_serializer=encode, response_deserializer=decode)
        message, app = StringValue(value="you"), (("application", "app"),)
        for metadata, code in ((app, "UNAUTHENTICATED"), ((*app, ("authorization", "Bearer x")), "PERMISSION_DENIED")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await say(message, metadata=metadata, timeout=WAIT_S)
            assert refused.value.code().name == code
        call = say(message, metadata=(*app, *token), timeout=WAIT_S)
        assert (await call).value == "hello you"
        trailing = dict(await call.trailing_metadata())
        assert trailing["x-heliostat-version"] == "sv_1"
        assert "request_id" in trailing
        assert [m.value async for m in count(message, metadata=(*app, *token), timeout=WAIT_S)] == [
            "you 0", "you 1", "you 2",
        ]  # fmt: skip
        assert (await say(message, metadata=(*app, *AS_PROBE.items()), timeout=WAIT_S)).value == "hello you"
        healthz = channel.unary_unary("/ray.serve.RayServeAPIService/Healthz")
        assert b"success" in await healthz(b"", timeout=WAIT_S)
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/ray.serve.RayServeAPIService/ListApplications")(b"", timeout=WAIT_S)
        counted = await asyncio.to_thread(serve.statistics)
        assert counted["connections"] == 1
    assert counted["requests"] - before["requests"] == 2
    assert counted["errors"] == before["errors"]
    assert counted["refused"] - before["refused"] == 3
    assert counted["probes"] - before["probes"] == 1
