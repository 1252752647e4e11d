"""Websockets behind the gate."""

from __future__ import annotations

from .policy import GateFile
from .problems import Problem
from .stats import Ticket
from .wire import App, Message, Receive, Scope, Send, with_version

ERROR_CODES = frozenset({1011, 1012, 1013, 1014})
"""Close codes: internal error, restart, try again later, bad gateway."""
REFUSED_CODE = 1008


class Socket:
    """One websocket. It counts as a request: its acceptance starts the answer, its end ends it."""

    __slots__ = ("_answered", "_failed", "_file", "_gone", "_receive", "_scope", "_send", "_ticket")

    def __init__(self, file: GateFile, ticket: Ticket | None, scope: Scope, receive: Receive, send: Send) -> None:
        self._file, self._ticket = file, ticket
        self._scope, self._receive, self._send = scope, receive, send
        self._answered = self._failed = self._gone = False

    async def run(self, app: App) -> None:
        returned = False
        try:
            await app(self._scope, self.receive, self.send)
            returned = True
        finally:
            # An application that returns after the acceptance closes the socket; before it, the server answers 500.
            broken = not self._gone and not (returned and self._answered)
            if self._ticket is not None:
                self._ticket.end(broken or self._failed)

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "websocket.disconnect":
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "websocket.close":
            self._failed = message.get("code", 1000) in ERROR_CODES
        elif kind == "websocket.http.response.start":
            self._failed = message["status"] >= 500
        if kind in ("websocket.accept", "websocket.http.response.start"):
            message = {**message, "headers": with_version(message.get("headers") or (), self._file.policy())}
        if not self._answered:
            self._answered = True
            if self._ticket is not None:
                self._ticket.answered()
        await self._send(message)


async def refuse(file: GateFile, scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
    await receive()  # websocket.connect
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": REFUSED_CODE, "reason": problem.code})
        return
    body, headers = problem.start()
    headers = with_version(headers, file.policy())
    await send({"type": "websocket.http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
