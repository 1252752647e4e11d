"""gRPC behind the gate."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum
from typing import Any

from .policy import GATE_FILE, Verdict, judge
from .problems import REFUSALS, Problem, closed
from .stats import STATS, Ticket
from .wire import VERSION_HEADER

ERROR_CODES = frozenset({2, 4, 13, 14, 15})
"""UNKNOWN, DEADLINE_EXCEEDED, INTERNAL, UNAVAILABLE, DATA_LOSS."""
HEALTHZ = "/ray.serve.RayServeAPIService/Healthz"
APPLICATIONS = "/ray.serve.RayServeAPIService/ListApplications"


def guard_grpc(servicer: object, server: Any) -> None:
    """Serve's gRPC proxy calls it like a function that adds a service to ``server``, a ``gRPCGenericServer``. From then
    on every method requires a token, Serve's own and those added before included; only ``Healthz`` needs none. On an
    unknown kind of server it raises, and the proxy does not start: no proxy is better than an unguarded one."""
    if getattr(server, "heliostat_guarded", False):
        return
    server.heliostat_guarded = True
    factory = server.service_handler_factory

    def guarded_factory(service_method: str, streaming_type: Any) -> Callable[..., Any]:
        handler = factory(service_method=service_method, streaming_type=streaming_type)
        return guarded(service_method, handler)

    server.service_handler_factory = guarded_factory
    for (handlers,) in list(server.generic_rpc_handlers):
        methods = dict(handlers._method_handlers)
        handlers._method_handlers = {m: server._override_method_handler(m, h) for m, h in methods.items()}
        for path, method in methods.items():
            _, service, name = path.split("/")
            server.add_registered_method_handlers(service, {name: method})
    _guard_passthrough(server)


def _guard_passthrough(server: Any) -> None:
    """For reflection, which Serve adds without its factory."""
    add_generic, add_registered = server.add_generic_rpc_handlers, server.add_registered_method_handlers

    def generic(handlers: Sequence[Any]) -> None:
        add_generic(handlers)
        for handler in handlers:
            methods = handler._method_handlers
            handler._method_handlers = {
                path: _guarded_method(path, m) if _passes(server, path) else m for path, m in methods.items()
            }

    def registered(service: str, methods: dict[str, Any]) -> None:
        if service in server._passthrough_service_names:
            methods = {name: _guarded_method(f"/{service}/{name}", m) for name, m in methods.items()}
        add_registered(service, methods)

    server.add_generic_rpc_handlers, server.add_registered_method_handlers = generic, registered


def _passes(server: Any, path: str) -> bool:
    return path.split("/")[1] in server._passthrough_service_names


def _guarded_method(path: str, method: Any) -> Any:
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    own = {k: guarded(path, h, counted=False) for k in kinds if (h := getattr(method, k)) is not None}
    return method._replace(**own)


def guarded(path: str, handler: Callable[..., Any], counted: bool = True) -> Callable[..., Any]:
    """``handler`` of grpc.aio behind the gate. Raises TypeError for one that is not async."""
    counted = counted and path not in (HEALTHZ, APPLICATIONS)

    async def unary(request: Any, context: Any) -> Any:
        call = await Call.begin(path, context, counted)
        with call:
            return await handler(request, call.context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        call = await Call.begin(path, context, counted)
        with call:
            async with contextlib.aclosing(handler(request, call.context)) as responses:
                async for response in responses:
                    call.answered()
                    yield response

    if inspect.isasyncgenfunction(handler):
        return stream
    if inspect.iscoroutinefunction(handler):
        return unary
    raise TypeError(f"{path}: the gate supports async handlers only")


class Call:
    """One gRPC call that passed the gate."""

    def __init__(self, context: Any, ticket: Ticket | None) -> None:
        self.context = context
        self._ticket = ticket

    @classmethod
    async def begin(cls, path: str, context: Any, counted: bool) -> Call:
        """Raises grpc.aio.AbortError for a refused call."""
        from grpc import StatusCode  # type: ignore[import-untyped]

        policy = GATE_FILE.policy()
        _set_version(context)
        if path == HEALTHZ:
            return cls(context, None)
        if policy is None:
            await context.abort(StatusCode.UNAVAILABLE, _text(closed(GATE_FILE.closed_reason)))
            raise AssertionError("abort raises")
        metadata = context.invocation_metadata() or ()
        verdict = judge(policy, [_bytes(value) for name, value in metadata if name == "authorization"])
        if verdict in REFUSALS:
            STATS.refused += 1
            code = StatusCode.UNAUTHENTICATED if verdict == Verdict.ABSENT else StatusCode.PERMISSION_DENIED
            await context.abort(code, _text(REFUSALS[verdict]))
        if verdict == Verdict.PROBE:
            STATS.probes += 1
            return cls(ProbeContext(context), None)
        return cls(context, STATS.start() if counted else None)

    def answered(self) -> None:
        if self._ticket is not None:
            self._ticket.answered()

    def __enter__(self) -> Call:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A call that its client cancelled ends with CancelledError, or with GeneratorExit between two responses."""
        if kind is None:
            _set_version(self.context)
        if self._ticket is not None:
            code = self.context.code()
            number = code.value[0] if isinstance(code, Enum) else code
            self._ticket.end(issubclass(kind, Exception) if kind is not None else number in ERROR_CODES)


class ProbeContext:
    """A call's context without the agent's token in the metadata."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def invocation_metadata(self) -> tuple[Any, ...]:
        return tuple(pair for pair in self._context.invocation_metadata() or () if pair[0] != "authorization")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def _set_version(context: Any) -> None:
    """In the trailing metadata, beside the application's own. Called before the call, for one that is refused or breaks
    off, and after it, for the application may have replaced the metadata."""
    policy = GATE_FILE.policy()
    name = VERSION_HEADER.decode()
    kept = [pair for pair in context.trailing_metadata() or () if pair[0] != name]
    if policy is not None:
        kept.append((name, policy.version_id))
    context.set_trailing_metadata(tuple(kept))


def _text(problem: Problem) -> str:
    return f"{problem.detail} {problem.remedy}"


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
