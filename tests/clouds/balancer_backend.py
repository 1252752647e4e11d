"""A backend for load balancers under test, as a process of its own that can be killed:

    python -m tests.clouds.balancer_backend <name> <port>

Answers on ``port``; 0: any free one. Its first line says which."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

sick = False


def app(name: str) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _websocket(name, receive, send)
        elif scope["type"] == "http":
            await _http(name, scope, receive, send)

    return serve


async def _http(name: str, scope: Scope, receive: Receive, send: Send) -> None:
    global sick
    path = scope["path"]
    query = scope["query_string"].decode()
    headers = [(b"x-backend", name.encode())]
    if path == "/stream":  # one event every 0.2 s
        await send(
            {"type": "http.response.start", "status": 200, "headers": [*headers, (b"content-type", b"text/plain")]}
        )
        for number in range(5):
            await send({"type": "http.response.body", "body": f"{number}\n".encode(), "more_body": True})
            await asyncio.sleep(0.2)
        await send({"type": "http.response.body"})
        return
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    status = 200
    if path == "/-/healthz":
        status = 503 if sick else 200
    elif path == "/sicken":
        sick = query == "1"
    elif path == "/slow":
        await asyncio.sleep(float(query))
    elif path == "/status":
        status = int(query)
    body = f"{name} {scope['method']} {scope['raw_path'].decode()} {size}".encode()
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})


async def _websocket(name: str, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": f"{name} {message['text']}"})


async def main(name: str, port: int) -> None:
    config = uvicorn.Config(
        app(name), port=port, log_level="error", access_log=False, timeout_keep_alive=75, loop="uvloop", lifespan="off"
    )
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await task


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
