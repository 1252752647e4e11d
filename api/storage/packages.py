"""The code that a request names: uploads that are in the bucket, URLs of zips that nodes can fetch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from api.storage.buckets import bucket_of, in_bucket
from clouds.contract.bucket import Bucket
from heliostat.errors import InvalidRequest, NotFound, NotHonoured
from heliostat.models.uploads import upload_key

UPLOAD = "upload:"
REMOTE = ("https", "http", "s3", "gs", "azure", "abfss", "file")
"""What Ray's nodes can fetch a zip from."""
URL_S = 3600
"""A package's URL is good for so long after hand-over: the agent fetches it at once and keeps the bytes."""


async def check(
    state: Any, project_id: str, cloud_id: str, named: list[tuple[str, str]], noun: str, excludes: str | None = None
) -> None:
    """``named``: (field, what stands there); ``excludes``: the field that has some, if any. Raises NotFound for an
    upload that is not there, InvalidRequest for what is no package, NotHonoured for excludes without an upload."""
    if excludes is not None and not any(uri.startswith(UPLOAD) for _, uri in named):
        raise NotHonoured(
            f"'excludes' says what is left out of an upload, and this {noun} uploads nothing.",
            remedy="Leave it out, or give working_dir as a directory.",
            field=excludes,
        )
    for field, uri in named:
        if uri.startswith(UPLOAD):
            key = upload_key(project_id, uri.removeprefix(UPLOAD))
            bucket = await bucket_of(state.buckets, cloud_id)
            if await in_bucket(partial(bucket.stat, key)) is None:
                raise NotFound(
                    f"The upload {uri[:24]}… is not in the bucket.",
                    remedy="POST /v1/uploads and PUT the zip first; the CLI and the SDK do it for directories.",
                    resource=uri,
                    field=field,
                )
            continue
        url = urlsplit(uri)
        if url.password:
            raise InvalidRequest(
                f"The URL of {field} holds a password, which would be shown to all who see the {noun}.",
                remedy="Upload the code instead, or use a URL that expires.",
                field=field,
            )
        if url.scheme not in REMOTE or not url.path.endswith((".zip", ".whl")):
            raise InvalidRequest(
                f"{field} is neither an upload nor the URL of a zip.",
                remedy="A directory is uploaded by the CLI and the SDK; else give https://…/code.zip, s3://… or gs://….",
                field=field,
            )


def sign(references: Iterable[str], project_id: str, bucket: Bucket, remedy: str) -> dict[str, dict[str, str]]:
    """What an agent fetches each package by. Blocks: call it on a thread. Raises NotFound when an upload is gone;
    ``remedy`` says what to do then."""
    found: dict[str, dict[str, str]] = {}
    for reference in set(references):
        if not reference.startswith(UPLOAD):
            found[reference] = {"remote": reference}
            continue
        digest = reference.removeprefix(UPLOAD)
        key = upload_key(project_id, digest)
        if bucket.stat(key) is None:
            raise NotFound(f"The uploaded package {digest[:12]}… is gone by retention.", remedy=remedy)
        found[reference] = {"url": bucket.presign_get(key, URL_S), "sha256": digest}
    return found
