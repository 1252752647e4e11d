"""The services' test application: answers that follow from the request, one kind for each of ``benchmarks.load_kinds``,
and ways to be broken.

``import_path: app:build`` with ``args``:
    version: how it calls itself, one word.
    mode: ``good``; ``crash`` (in ``__init__``), ``fail`` (500), ``hang`` (no answer), ``slow`` (``delay_s`` × 10).
    share: of the requests that are answered so; the others are answered well. Default 1.
    delay_s: what each answer takes. Default 0.02.
    replicas: default 1.
    probe: ``good`` answers the root path well whatever the mode; ``mode``: like everything else. Default ``good``.

The root path is what Heliostat asks to see whether a version is fit for traffic. Annotations are real objects here:
Serve ships the class by value, and FastAPI could not resolve their names there.
"""

import asyncio
import hashlib
import os
import random
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, HTTPException, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import PlainTextResponse, StreamingResponse
from ray import serve

api = FastAPI()


def pad(nonce: str) -> str:
    return hashlib.sha256(nonce.encode()).hexdigest() * 16


@serve.deployment(ray_actor_options={"num_cpus": 0.05}, max_ongoing_requests=1000, graceful_shutdown_timeout_s=30)
@serve.ingress(api)
class Echo:
    def __init__(self, version: str, mode: str, share: float, delay_s: float, probe: str) -> None:
        if mode == "crash":
            raise RuntimeError(f"version {version} was told to crash at its start")
        self._version, self._mode, self._share, self._probe = version, mode, share, probe
        self._delay_s = delay_s

    async def _behave(self) -> None:
        bad = random.random() < self._share
        await asyncio.sleep(self._delay_s * (10 if bad and self._mode == "slow" else 1))
        if bad and self._mode == "fail":
            raise HTTPException(500, f"version {self._version} was told to fail")
        if bad and self._mode == "hang":
            await asyncio.sleep(3600)

    @api.get("/")
    async def root(self) -> PlainTextResponse:
        if self._probe != "good":
            await self._behave()
        return PlainTextResponse(f"{self._version} {os.getpid()}\n")

    @api.get("/echo")
    async def echo(self, nonce: str) -> PlainTextResponse:
        await self._behave()
        return PlainTextResponse(f"{self._version} {nonce} {pad(nonce)}\n")

    @api.post("/digest")
    async def digest(self, nonce: str, request: Request) -> PlainTextResponse:
        body = await request.body()
        await self._behave()
        return PlainTextResponse(f"{self._version} {nonce} {hashlib.sha256(body).hexdigest()} {len(body)}\n")

    @api.get("/slow")
    async def slow(self, nonce: str, seconds: float) -> PlainTextResponse:
        await self._behave()
        await asyncio.sleep(seconds)
        return PlainTextResponse(f"{self._version} {nonce} {pad(nonce)}\n")

    @api.get("/stream")
    async def stream(self, nonce: str, chunks: int, seconds: float) -> StreamingResponse:
        await self._behave()

        async def lines() -> AsyncIterator[str]:
            for number in range(chunks):
                yield f"{self._version} {nonce} {number}/{chunks}\n"
                await asyncio.sleep(seconds / chunks)

        return StreamingResponse(lines(), media_type="text/plain")

    @api.websocket("/ws")
    async def ws(self, socket: WebSocket) -> None:
        await self._behave()
        await socket.accept()
        try:
            while True:
                await socket.send_text(f"{self._version} {await socket.receive_text()}")
        except WebSocketDisconnect:
            pass  # the client has closed it: that is its end


def build(args: dict[str, Any]) -> serve.Application:
    options = Echo.options(num_replicas=int(args.get("replicas", 1)))
    return options.bind(
        version=str(args["version"]),
        mode=str(args.get("mode", "good")),
        share=float(args.get("share", 1)),
        delay_s=float(args.get("delay_s", 0.02)),
        probe=str(args.get("probe", "good")),
    )
