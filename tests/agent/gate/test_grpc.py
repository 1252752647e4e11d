"""The gate before gRPC: Serve's own gRPC server, with a proxy behind it that answers without replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import StringValue
from grpc.aio import _server
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agent.gate import grpc as gate_grpc
from agent.gate.policy import GateFile
from agent.gate.stats import Stats
from tests.agent.conftest import held_port
from tests.agent.gate.support import PROBE, TOKEN, GateWriter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
WAIT_S = 20.0
KINDS = ("UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream")
BEARER = (("authorization", "Bearer " + TOKEN.decode()),)
AS_PROBE = (("authorization", "Bearer " + PROBE.decode()),)


def add_echo(servicer: Any, server: Any) -> None:
    """As generated code does for a service with the four kinds of methods, in the way of today's generator."""
    encoders = {"request_deserializer": StringValue.FromString, "response_serializer": StringValue.SerializeToString}
    methods = {
        "UnaryUnary": grpc.unary_unary_rpc_method_handler(servicer.UnaryUnary, **encoders),
        "UnaryStream": grpc.unary_stream_rpc_method_handler(servicer.UnaryStream, **encoders),
        "StreamUnary": grpc.stream_unary_rpc_method_handler(servicer.StreamUnary, **encoders),
        "StreamStream": grpc.stream_stream_rpc_method_handler(servicer.StreamStream, **encoders),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", methods),))
    server.add_registered_method_handlers("test.Echo", methods)


class Proxy:
    """In the place of Serve's ``gRPCProxy``. What it is to do is in the first message's text."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.go = asyncio.Event()

    def service_handler_factory(self, service_method: str, streaming_type: Any) -> Any:
        async def act(request: Any, context: Any) -> bytes:
            self.seen.append((service_method, dict(context.invocation_metadata())))
            if hasattr(request, "__aiter__"):
                texts = [m.value async for m in request]
                text = " ".join(texts)
            else:
                text = getattr(request, "value", "")
            if text == "raise":
                raise RuntimeError("application's own")
            if text == "wait":
                await self.go.wait()
            if text.startswith("code "):
                context.set_code(getattr(grpc.StatusCode, text.removeprefix("code ")))
            context.set_trailing_metadata((("x-own", "1"), ("x-heliostat-version", "sv_other")))
            return StringValue(value=text).SerializeToString()

        async def unary(request: Any, context: Any) -> bytes:
            return await act(request, context)

        async def stream(request: Any, context: Any) -> AsyncIterator[bytes]:
            first = await act(request, context)
            yield first
            if first == StringValue(value="wait after the first").SerializeToString():
                await self.go.wait()
            yield StringValue(value="and").SerializeToString()

        return stream if streaming_type.value.endswith("stream") else unary


class Served:
    def __init__(self, port: int, writer: GateWriter, stats: Stats, proxy: Proxy) -> None:
        self.writer, self.stats, self.proxy, self.port = writer, stats, proxy, port
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    def call(self, kind: str, text: str = "hello", channel: Any = None, metadata: Any = BEARER) -> Any:
        encode, decode = StringValue.SerializeToString, StringValue.FromString
        on = channel or self.channel
        method = {
            "UnaryUnary": on.unary_unary, "UnaryStream": on.unary_stream,
            "StreamUnary": on.stream_unary, "StreamStream": on.stream_stream,
        }[kind](f"/test.Echo/{kind}", request_serializer=encode, response_deserializer=decode)  # fmt: skip
        message = StringValue(value=text)
        start = method.future if channel and not kind.endswith("Stream") else method
        return start(iter([message]) if kind.startswith("Stream") else message, metadata=metadata, timeout=WAIT_S)

    async def ask(self, kind: str, text: str = "hello", metadata: Any = BEARER) -> tuple[str, list[str]]:
        """Code and texts."""
        code, texts, _ = await self.ended(kind, text, metadata)
        return code, texts

    async def ended(self, kind: str, text: str, metadata: Any) -> tuple[str, list[str], Any]:
        """Code, texts and the call. By the blocking client: that of grpc.aio tells INTERNAL in place of what the server
        said when it is refused while it still writes (grpc/grpc#36066)."""

        def ask() -> tuple[str, list[str], Any]:
            with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
                call, texts = self.call(kind, text, channel, metadata), []
                try:
                    texts = [m.value for m in call] if kind.endswith("Stream") else [call.result().value]
                except grpc.RpcError:
                    pass  # its code says why
                return call.code().name, texts, call

        return await asyncio.to_thread(ask)

    async def serves_own(self, method: str, metadata: Any = None) -> str:
        call = self.channel.unary_unary(f"/ray.serve.RayServeAPIService/{method}")
        try:
            await call(b"", metadata=metadata, timeout=WAIT_S)
        except grpc.aio.AioRpcError as e:
            return str(e.code().name)
        return "OK"

    async def reflect(self, metadata: Any = None) -> str | list[str]:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")

        def ask() -> str | list[str]:
            with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                try:
                    (answer,) = stub.ServerReflectionInfo(iter([asked]), metadata=metadata, timeout=WAIT_S)
                except grpc.RpcError as e:
                    return str(e.code().name)
            return [s.name for s in answer.list_services_response.service]

        return await asyncio.to_thread(ask)


@contextlib.asynccontextmanager
async def serving(folder: Path, monkeypatch: pytest.MonkeyPatch, functions: list[Any]) -> AsyncIterator[Served]:
    from ray.serve._private.grpc_util import start_grpc_server

    writer, stats, proxy = GateWriter(folder / "gate.json"), Stats(), Proxy()
    monkeypatch.setattr(gate_grpc, "GATE_FILE", GateFile(str(writer.path)))
    monkeypatch.setattr(gate_grpc, "STATS", stats)
    with held_port() as port:
        options = SimpleNamespace(port=port, grpc_servicer_func_callable=functions, enable_reflection=True)
        task, server = await start_grpc_server(
            proxy.service_handler_factory,
            options,
            event_loop=asyncio.get_running_loop(),
            enable_so_reuseport=True,
        )
        served = Served(port, writer, stats, proxy)
        try:
            yield served
        finally:
            proxy.go.set()
            await served.channel.close()
            await server.stop(None)
            await asyncio.wait_for(task, WAIT_S)


@pytest.fixture(params=["first", "last", "twice", "last, old grpcio"])
async def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever its place among the functions: nothing may be left without a guard."""
    guard = gate_grpc.guard_grpc
    place, _, old = request.param.partition(", ")
    if old:  # it knows generic handlers only, and Serve goes by that
        monkeypatch.setattr(_server.Server, "add_registered_method_handlers", lambda *args: None)
    functions = {"first": [guard, add_echo], "last": [add_echo, guard], "twice": [guard, add_echo, guard]}
    async with serving(tmp_path, monkeypatch, functions[place]) as served:
        yield served


async def test_every_kind_of_method_asks_for_the_token(served: Served) -> None:
    for kind in KINDS:
        assert await served.ask(kind, metadata=None) == ("UNAUTHENTICATED", [])
        assert await served.ask(kind, metadata=(("authorization", "Bearer x"),)) == ("PERMISSION_DENIED", [])
        assert await served.ask(kind, metadata=BEARER * 2) == ("PERMISSION_DENIED", [])
    assert served.proxy.seen == []
    assert served.stats.snapshot()["refused"] == 12
    assert served.stats.snapshot()["requests"] == 0
    for kind in KINDS:
        assert await served.ask(kind) == ("OK", ["hello", "and"] if kind.endswith("Stream") else ["hello"])
        assert await served.ask(kind, metadata=(("authorization", BEARER[0][1].lower()),)) in (
            ("OK", ["hello", "and"]), ("OK", ["hello"]),
        )  # fmt: skip
    counted = served.stats.snapshot()
    assert (counted["requests"], counted["errors"], counted["ongoing"], sum(counted["buckets"])) == (8, 0, 0, 8)
    assert served.proxy.seen[0][1]["authorization"] == BEARER[0][1]


async def test_serves_own_methods_and_reflection(served: Served) -> None:
    assert await served.serves_own("Healthz") == "OK"
    assert await served.serves_own("ListApplications") == "UNAUTHENTICATED"
    assert await served.serves_own("ListApplications", BEARER) == "OK"
    assert await served.reflect() == "UNAUTHENTICATED"
    assert await served.reflect((("authorization", "Bearer x"),)) == "PERMISSION_DENIED"
    assert "test.Echo" in await served.reflect(BEARER)
    assert served.stats.snapshot()["requests"] == 0


async def test_a_probe_is_not_counted_and_its_token_stays_here(served: Served) -> None:
    for kind in KINDS:
        assert (await served.ask(kind, metadata=(*AS_PROBE, ("application", "a"))))[0] == "OK"
    assert len(served.proxy.seen) == 4
    assert all("authorization" not in m and m["application"] == "a" for _, m in served.proxy.seen)
    counted = served.stats.snapshot()
    assert (counted["requests"], counted["probes"], counted["last_request_at"]) == (0, 4, None)


@pytest.mark.parametrize(
    ("text", "code", "errors"),
    [
        ("code INTERNAL", "INTERNAL", 1),
        ("code UNAVAILABLE", "UNAVAILABLE", 1),
        ("code DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 1),
        ("code NOT_FOUND", "NOT_FOUND", 0),
        ("code RESOURCE_EXHAUSTED", "RESOURCE_EXHAUSTED", 0),
        ("raise", "UNKNOWN", 1),
    ],
)
async def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: str, errors: int) -> None:
    async with serving(tmp_path, monkeypatch, [gate_grpc.guard_grpc, add_echo]) as served:
        for n, kind in enumerate(KINDS, 1):
            assert (await served.ask(kind, text))[0] == code
            counted = served.stats.snapshot()
            assert (counted["requests"], counted["errors"], counted["ongoing"]) == (n, errors * n, 0)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    async with serving(tmp_path, monkeypatch, [gate_grpc.guard_grpc, add_echo]) as served:
        call = served.call(kind, "wait")
        reading = asyncio.ensure_future(call.read() if kind.endswith("Stream") else call.wait_for_connection())
        async with asyncio.timeout(WAIT_S):
            while not served.stats.snapshot()["ongoing"]:
                await asyncio.sleep(0.01)
            call.cancel()
            while served.stats.snapshot()["ongoing"]:
                await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait([reading])
        counted = served.stats.snapshot()
        assert (counted["requests"], counted["errors"]) == (1, 0)


@pytest.mark.parametrize("kind", ["UnaryStream", "StreamStream"])
async def test_a_stream_is_answered_with_its_first_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with serving(tmp_path, monkeypatch, [gate_grpc.guard_grpc, add_echo]) as served:
        call = served.call(kind, "wait after the first")
        assert (await call.read()).value == "wait after the first"
        counted = served.stats.snapshot()
        assert (counted["ongoing"], counted["requests"], counted["oldest_s"], sum(counted["buckets"])) == (1, 0, 0, 1)
        served.proxy.go.set()
        assert (await call.read()).value == "and"
        assert await call.code() == grpc.StatusCode.OK
        assert served.stats.snapshot()["requests"] == 1


async def test_the_version_is_in_the_trailing_metadata(served: Served) -> None:
    for kind in ("UnaryUnary", "StreamStream"):
        call = served.call(kind)
        if kind == "UnaryUnary":
            await call
        else:
            assert [m.value async for m in call]
        trailing = list(await call.trailing_metadata())
        assert trailing == [("x-own", "1"), ("x-heliostat-version", "sv_1")]
        code, _, ended = await served.ended(kind, "hello", None)
        assert code == "UNAUTHENTICATED"
        assert list(ended.trailing_metadata()) == [("x-heliostat-version", "sv_1")]
        assert "Authorization: Bearer" in ended.details()


async def test_without_a_policy_only_the_health_check_passes(served: Served) -> None:
    served.writer.path.write_text("{")
    async with asyncio.timeout(WAIT_S):
        while (await served.ask("UnaryUnary"))[0] != "UNAVAILABLE":
            await asyncio.sleep(0.01)
    for kind in KINDS:
        assert (await served.ask(kind, metadata=AS_PROBE))[0] == "UNAVAILABLE"
    assert await served.reflect(BEARER) == "UNAVAILABLE"
    assert await served.serves_own("Healthz") == "OK"
    served.writer.write(enabled=False)
    async with asyncio.timeout(WAIT_S):
        while (await served.ask("UnaryUnary", metadata=None))[0] != "OK":
            await asyncio.sleep(0.01)
    assert (await served.reflect()) != "UNAUTHENTICATED"


def test_a_handler_that_blocks_is_not_guarded_but_refused() -> None:
    with pytest.raises(TypeError, match="async handlers only"):
        gate_grpc.guarded("/a.B/C", lambda request, context: None)
