"""For the tests of the gate: gate files as the agent writes them, and requests driven through a gate by hand."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

from agent.gate.http import Gate
from agent.gate.policy import GateFile
from agent.gate.stats import Stats

Headers = list[tuple[bytes, bytes]]

TOKEN = b"token-of-the-service"
OLD = b"token-that-is-still-valid"
PROBE = b"token-of-the-agent"
BEARER = (b"authorization", b"Bearer " + TOKEN)
AS_PROBE = (b"authorization", b"Bearer " + PROBE)


def sha256(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


class GateWriter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "service_id": "svc_1", "version_id": "sv_1", "enabled": True, "hashes": [sha256(TOKEN), sha256(OLD)],
            "probe_hash": sha256(PROBE), "draining": False, "revision": 1,
        }  # fmt: skip
        self.write()

    def write(self, **changes: Any) -> None:
        """By rename, so that nobody reads half a file."""
        self.content |= changes
        new = self.path.with_suffix(".new")
        new.touch(0o600)
        new.write_text(json.dumps(self.content))
        new.replace(self.path)


class Asked:
    """One request, driven through a gate by hand. ``incoming``: what ``receive`` gives, the last one for ever."""

    def __init__(self, app: Any, writer: GateWriter, stats: Stats | None = None) -> None:
        self.stats = stats or Stats()
        self.gate = Gate(app, GateFile(str(writer.path)), self.stats)
        self.sent: list[dict[str, Any]] = []
        self.scope: dict[str, Any] = {}

    async def __call__(
        self,
        path: str = "/",
        headers: Headers | None = None,
        method: str = "GET",
        incoming: list[dict[str, Any]] | None = None,
        **scope: Any,
    ) -> int:
        """The status; 0 if none was sent."""
        self.scope = {"type": "http", "method": method, "path": path, "headers": headers or [], "root_path": ""} | scope
        if self.scope["type"] == "http":
            messages = incoming or [{"type": "http.request", "body": b"", "more_body": False}]
        else:
            messages = [{"type": "websocket.connect"}, *(incoming or [{"type": "websocket.disconnect", "code": 1005}])]
        self.sent = []
        rest = iter(messages)

        async def receive() -> Any:
            await asyncio.sleep(0)
            return next(rest, messages[-1])

        async def send(message: Any) -> None:
            self.sent.append(message)

        await self.gate(self.scope, receive, send)
        return int(self.sent[0].get("status", 0)) if self.sent else 0

    def header(self, name: str) -> list[bytes]:
        return [v for n, v in self.sent[0]["headers"] if n == name.lower().encode()]

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])


def answering(status: int = 200, headers: Any = (), body: bytes = b"ok") -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body[:1], "more_body": True})
        await send({"type": "http.response.body", "body": body[1:]})

    return app
