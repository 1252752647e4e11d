"""Websockets through the gate, message by message."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.agent.gate.support import BEARER, Asked, GateWriter

EXTENSION = {"websocket.http.response": {}}


async def test_websockets_are_refused(writer: GateWriter) -> None:
    asked = Asked(pytest.fail, writer)
    assert await asked(type="websocket", extensions=EXTENSION) == 401
    assert asked.sent[0]["type"] == "websocket.http.response.start"
    assert json.loads(asked.body)["code"] == "unauthenticated"
    wrong = [(b"authorization", b"Bearer x")]
    assert await asked(headers=wrong, type="websocket", extensions=EXTENSION) == 403
    await asked(headers=wrong, type="websocket")
    assert [(m["type"], m["code"]) for m in asked.sent] == [("websocket.close", 1008)]
    assert asked.stats.snapshot()["refused"] == 3


WsApp = Callable[[Any, Any, Any], Awaitable[None]]


def _socket(*messages: dict[str, Any], wait: bool = False, fail: bool = False) -> WsApp:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for message in messages:
            await send(message)
        if wait:
            await receive()
        if fail:
            raise RuntimeError("application's own")

    return app


ACCEPT = {"type": "websocket.accept", "headers": [(b"x-a", b"b")]}
CLOSE: dict[str, Any] = {"type": "websocket.close"}


@pytest.mark.parametrize(
    ("app", "errors"),
    [
        (_socket(ACCEPT, CLOSE), 0),
        (_socket(ACCEPT), 0),
        (_socket(ACCEPT, wait=True), 0),
        (_socket(ACCEPT, wait=True, fail=True), 0),
        (_socket(CLOSE), 0),
        (_socket(ACCEPT, CLOSE | {"code": 1011}), 1),
        (_socket(ACCEPT, fail=True), 1),
        (_socket(fail=True), 1),
        (_socket(), 1),
        (_socket({"type": "websocket.http.response.start", "status": 404, "headers": []}), 0),
        (_socket({"type": "websocket.http.response.start", "status": 503, "headers": []}), 1),
    ],
)
async def test_websockets_are_counted(writer: GateWriter, app: WsApp, errors: int) -> None:
    asked = Asked(app, writer)
    try:
        await asked(headers=[BEARER], type="websocket", extensions=EXTENSION)
    except RuntimeError:
        pass
    counted = asked.stats.snapshot()
    assert (counted["requests"], counted["errors"], counted["ongoing"]) == (1, errors, 0)
    assert sum(counted["buckets"]) == 1
    if asked.sent and asked.sent[0]["type"] == "websocket.accept":
        assert asked.sent[0]["headers"] == [(b"x-a", b"b"), (b"x-heliostat-version", b"sv_1")]
