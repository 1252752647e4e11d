"""Serves a local bucket's signed URLs: GET (Range), HEAD and PUT of ``/objects/<key>``, and ``/healthz``.

    python -m clouds.local.bucket.server [--host H] [--port P] [--root DIR]

Defaults come from the settings (``HELIOSTAT_BUCKET_PORT``, ``HELIOSTAT_HOME``/bucket); the signing key comes from
the installation's secret, never by the command line.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from clouds.contract.errors import QuotaExceeded
from clouds.local.bucket.bucket import LocalBucket
from clouds.signed_urls import Grant
from heliostat.errors import HeliostatError, InvalidRequest
from runtime.keys import load_or_create
from runtime.settings import Settings

BLOCK = 2**20
"""Bytes of one body that are in memory at a time."""
DRAIN_MAX = 64 * 2**20
"""How much of an unwelcome body is read and dropped, so that its sender gets to read why."""


class Receiving(Protocol):
    @property
    def size(self) -> int: ...
    def write(self, data: bytes) -> None: ...
    def sha256(self) -> str: ...
    def commit(self) -> None: ...


class Served(Protocol):
    """A bucket whose URLs this server honours."""

    def verify(self, method: str, key: str, query: Mapping[str, str]) -> Grant: ...
    def open(self, key: str) -> BinaryIO: ...
    def incoming(self, key: str) -> AbstractContextManager[Receiving]: ...


class WrongBytes(InvalidRequest):
    """Not what the URL was signed for; 400, as S3 answers."""

    status = 400


def create_app(bucket: Served) -> Starlette:
    async def serve(request: Request) -> Response:
        try:
            grant = bucket.verify(request.method, request.path_params["key"], request.query_params)
            if request.method == "PUT":
                return await _put(bucket, request, grant)
            return _get(bucket, request)
        except HeliostatError as e:
            if request.method == "PUT":
                await _drain(request)
            status = 507 if isinstance(e, QuotaExceeded) else e.status
            return JSONResponse(e.to_problem() | {"status": status}, status, media_type="application/problem+json")

    async def healthz(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    return Starlette(
        routes=[Route("/healthz", healthz), Route("/objects/{key:path}", serve, methods=["GET", "HEAD", "PUT"])]
    )


async def _put(bucket: Served, request: Request, grant: Grant) -> Response:
    key = request.path_params["key"]
    declared = request.headers.get("content-length")
    if grant.size is not None and declared is not None and int(declared) != grant.size:
        raise _refused(f"Object {key} was declared with {grant.size} bytes; {declared} come.", key)
    try:
        with await asyncio.to_thread(bucket.incoming, key) as incoming:
            async for block in _blocks(request):
                if grant.size is not None and incoming.size + len(block) > grant.size:
                    raise _refused(f"Object {key} was declared with {grant.size} bytes; more come.", key)
                await asyncio.to_thread(incoming.write, block)
            if grant.size is not None and incoming.size != grant.size:
                raise _refused(f"Object {key} was declared with {grant.size} bytes; {incoming.size} came.", key)
            if grant.sha256 is not None and incoming.sha256() != grant.sha256:
                raise _refused(f"The bytes of object {key} are not those declared: their sha256 differs.", key)
            await asyncio.to_thread(incoming.commit)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it; nothing was stored
    return Response(status_code=200)


def _refused(message: str, key: str) -> WrongBytes:
    return WrongBytes(message, remedy="Send the bytes that the URL was made for.", resource=key)


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    """The body in blocks of about 1 MiB: uvicorn hands over 64 KiB, and each write is a hop to a thread."""
    waiting = bytearray()
    async for chunk in request.stream():
        waiting += chunk
        if len(waiting) >= BLOCK:
            yield bytes(waiting)
            waiting.clear()
    if waiting:
        yield bytes(waiting)


async def _drain(request: Request) -> None:
    left = DRAIN_MAX
    with suppress(ClientDisconnect, RuntimeError):  # RuntimeError: the body was read to its end already
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return


def _get(bucket: Served, request: Request) -> Response:
    key = request.path_params["key"]
    file = bucket.open(key)
    size = file.seek(0, 2)
    headers = {"accept-ranges": "bytes"}
    start, end, status = 0, size, 200
    wanted = request.headers.get("range")
    if wanted is not None and (parsed := _range(wanted, size)) is not None:
        start, end = parsed
        if start >= end:
            file.close()
            return Response(status_code=416, headers={"content-range": f"bytes */{size}"})
        status = 206
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    headers["content-length"] = str(end - start)
    if request.method == "HEAD":
        file.close()
        return Response(status_code=status, headers=headers, media_type="application/octet-stream")
    body = _read(file, start, end)
    return StreamingResponse(body, status, headers, media_type="application/octet-stream")


def _range(header: str, size: int) -> tuple[int, int] | None:
    """(first, one past the last) byte; None: not a single byte range, so the whole (RFC 9110 §14.2)."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    return int(match[1]), min(size, int(match[2]) + 1) if match[2] else size


async def _read(file: BinaryIO, start: int, end: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(start)
        while start < end:
            block = await asyncio.to_thread(file.read, min(BLOCK, end - start))
            if not block:
                raise OSError("the object is shorter than it was")  # cuts the answer short: its reader must notice
            start += len(block)
            yield block


def main() -> None:
    settings = Settings()
    parser = argparse.ArgumentParser(prog="python -m clouds.local.bucket.server")
    parser.add_argument("--host", default=settings.bucket_host)
    parser.add_argument("--port", type=int, default=settings.bucket_port)
    parser.add_argument("--root", type=Path, default=settings.home / "bucket")
    args = parser.parse_args()
    key = load_or_create(settings.home, settings.secret_key).bucket_key()
    bucket = LocalBucket(args.root, "", key, quota_bytes=settings.bucket_quota_bytes or None)
    bucket.remove_leftovers()
    # No access log: signed URLs are secrets.
    uvicorn.run(
        create_app(bucket),
        host=args.host,
        port=args.port,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=5,
    )


if __name__ == "__main__":
    main()
