"""Cloud Storage of the Google Cloud fake: the JSON API, and the XML API as far as V4 signed URLs use it. Signatures are
really checked, with the public key of the service account that signed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from tests.lab.gce_filter import Refused
from tests.lab.gcp_auth import Auth

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Storage:
    """``faults``: statuses that the next calls of the JSON API answer."""

    bucket: str = "acme-heliostat"
    location: str = "US-CENTRAL1"
    project_number: str = "123456789"
    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    faults: list[int] = field(default_factory=list)
    page: int = 1000
    calls: Counter[str] = field(default_factory=Counter)

    def described(self, name: str) -> dict[str, Any]:
        data, at = self.objects[name]
        updated = datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.bucket,
            "size": str(len(data)),
            "updated": updated,
            "md5Hash": md5,
        }


def routes(app: FastAPI, the: Callable[[], Storage], auth: Callable[[], Auth]) -> None:
    def called(request: Request, bucket: str, what: str) -> Storage:
        storage = the()
        storage.calls[what] += 1
        auth().check(request)
        if storage.faults:
            status = storage.faults.pop(0)
            raise Refused(status, {403: "forbidden", 429: "rateLimitExceeded"}.get(status, "backendError"), "injected")
        if bucket != storage.bucket:
            raise Refused(404, "notFound", "The specified bucket does not exist.")
        return storage

    @app.get("/storage/v1/b/{bucket}")
    async def bucket_itself(request: Request, bucket: str) -> Any:
        storage = called(request, bucket, "get bucket")
        kind = "region" if "-" in storage.location else "multi-region"
        told = {"location": storage.location, "locationType": kind, "projectNumber": storage.project_number}
        return {"kind": "storage#bucket", "name": bucket, **told}

    @app.post("/upload/storage/v1/b/{bucket}/o")
    async def upload(request: Request, bucket: str) -> Any:
        storage = called(request, bucket, "insert")
        name = request.query_params["name"]
        storage.objects[name] = (await request.body(), time.time())
        return storage.described(name)

    @app.get("/storage/v1/b/{bucket}/o")
    async def listed(request: Request, bucket: str) -> Any:
        storage = called(request, bucket, "list")
        q = request.query_params
        names = sorted(
            n for n in storage.objects if n.startswith(q.get("prefix", "")) and n >= q.get("startOffset", "")
        )
        start = int(q.get("pageToken", 0))
        page = {"items": [storage.described(n) for n in names[start : start + storage.page]]}
        return page | ({"nextPageToken": str(start + storage.page)} if len(names) > start + storage.page else {})

    @app.get("/storage/v1/b/{bucket}/o/{name:path}")
    async def got(request: Request, bucket: str, name: str) -> Any:
        storage = called(request, bucket, "get")
        if name not in storage.objects:
            raise Refused(404, "notFound", f"No such object: {bucket}/{name}")
        if request.query_params.get("alt") == "media":
            return Response(storage.objects[name][0], media_type="application/octet-stream")
        return storage.described(name)

    @app.delete("/storage/v1/b/{bucket}/o/{name:path}")
    async def deleted(request: Request, bucket: str, name: str) -> Any:
        storage = called(request, bucket, "delete")
        if storage.objects.pop(name, None) is None:
            raise Refused(404, "notFound", f"No such object: {bucket}/{name}")
        return Response(status_code=204)

    @app.api_route("/{bucket}/{name:path}", methods=["GET", "HEAD", "PUT", "DELETE"])
    async def signed(request: Request, bucket: str, name: str) -> Any:
        storage = the()
        try:
            _verify(request, auth())
        except (KeyError, ValueError, InvalidSignature) as e:
            return Response(f"<Error><Code>SignatureDoesNotMatch</Code><Message>{e!r}</Message></Error>", 403)
        if request.method == "PUT":
            body = await request.body()
            limits = request.headers.get("x-goog-content-length-range")
            if limits is not None and not int(limits.split(",")[0]) <= len(body) <= int(limits.split(",")[1]):
                return Response("<Error><Code>EntityTooLarge</Code></Error>", 400)
            given = request.headers.get("x-goog-hash", "")
            md5 = base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
            if given.startswith("md5=") and given != f"md5={md5}":
                return Response("<Error><Code>BadDigest</Code></Error>", 400)
            storage.objects[name] = (body, time.time())
            return Response(status_code=200)
        if name not in storage.objects:
            return Response("<Error><Code>NoSuchKey</Code></Error>", 404)
        return _ranged(storage.objects[name][0], request.headers.get("range"), request.method == "HEAD")

    @app.exception_handler(binascii.Error)
    async def garbled(_request: Request, _e: binascii.Error) -> JSONResponse:
        return JSONResponse({}, 400)


def _verify(request: Request, auth: Auth) -> None:
    """https://cloud.google.com/storage/docs/authentication/canonical-requests. Raises what it does not like."""
    query = dict(request.query_params)
    signature = bytes.fromhex(query.pop("X-Goog-Signature"))
    if query["X-Goog-Algorithm"] != "GOOG4-RSA-SHA256":
        raise ValueError("algorithm")
    account, _, scope = query["X-Goog-Credential"].partition("/")
    at = datetime.strptime(query["X-Goog-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    if not 1 <= int(query["X-Goog-Expires"]) <= 604800:
        raise ValueError("expires")
    if time.time() > at + int(query["X-Goog-Expires"]):
        raise ValueError("ExpiredToken")
    names = query["X-Goog-SignedHeaders"].split(";")
    if "host" not in names:
        raise ValueError("host is not signed")
    for name in request.headers:
        if name.startswith("x-goog-") and name not in names:
            raise ValueError(f"{name} is not signed")
    method = "GET" if request.method == "HEAD" else request.method
    canonical = "\n".join(
        [
            method,
            request.scope["raw_path"].decode(),
            "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items())),
            *(f"{name}:{request.headers[name]}" for name in names),
            "",
            ";".join(names),
            "UNSIGNED-PAYLOAD",
        ]
    )
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = f"GOOG4-RSA-SHA256\n{query['X-Goog-Date']}\n{scope}\n{digest}"
    auth.accounts[account].public_key().verify(signature, text.encode(), padding.PKCS1v15(), hashes.SHA256())


def _ranged(data: bytes, asked: str | None, head: bool) -> Response:
    found = _RANGE.fullmatch(asked or "")
    if found is None or not (found[1] or found[2]):
        return Response(b"" if head else data, headers={"content-length": str(len(data))})
    if found[1]:
        start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
    else:
        start, end = max(0, len(data) - int(found[2])), len(data) - 1
    if start >= len(data):
        return Response(status_code=416, headers={"content-range": f"bytes */{len(data)}"})
    part = data[start : end + 1]
    return Response(part, 206, headers={"content-range": f"bytes {start}-{end}/{len(data)}"})
