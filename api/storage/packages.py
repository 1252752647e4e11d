"""The code that a request names: uploads in the bucket, or URLs of zips that nodes can fetch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from urllib.parse import urlsplit

from api.storage.buckets import bucket_of, in_bucket
from clouds.contract.bucket import Bucket
from heliostat.errors import InvalidRequest, NotFound, NotHonoured
from heliostat.models.uploads import upload_key

UPLOAD = "upload:"
REMOTE = ("https", "http", "s3", "gs", "azure", "abfss", "file")
"""Schemes of URLs that Ray's nodes can fetch a zip from."""
URL_S = 3600
"""How long a package's signed URL is valid: the agent fetches it at once and keeps the bytes."""


async def check_packages(
    buckets: Mapping[str, Bucket],
    project_id: str,
    cloud_id: str,
    named: list[tuple[str, str]],
    noun: str,
    excludes: str | None = None,
) -> None:
    """``named``: (field, its value); ``excludes``: the field with the excludes, if there is one. Raises NotFound for an
    upload that is not in the bucket, InvalidRequest for a value that is not a package, NotHonoured for excludes without
    an upload."""
    if excludes is not None and not any(uri.startswith(UPLOAD) for _, uri in named):
        raise NotHonoured(
            f"'excludes' applies to an upload, and this {noun} uploads nothing.",
            remedy="Leave it out, or give working_dir as a directory.",
            field=excludes,
        )
    for field, uri in named:
        if uri.startswith(UPLOAD):
            key = upload_key(project_id, uri.removeprefix(UPLOAD))
            bucket = await bucket_of(buckets, cloud_id)
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
                f"The URL of {field} holds a password, which everybody who can see the {noun} would see.",
                remedy="Upload the code instead, or use a URL that expires.",
                field=field,
            )
        if url.scheme not in REMOTE or not url.path.endswith((".zip", ".whl")):
            raise InvalidRequest(
                f"{field} is neither an upload nor the URL of a zip.",
                remedy="The CLI and the SDK upload a directory; otherwise give https://…/code.zip, s3://… or gs://….",
                field=field,
            )


def sign(references: Iterable[str], project_id: str, bucket: Bucket, remedy: str) -> dict[str, dict[str, str]]:
    """How an agent fetches each package. Blocks: call it on a thread. Raises NotFound, with ``remedy``, when an upload
    has been deleted."""
    found: dict[str, dict[str, str]] = {}
    for reference in set(references):
        if not reference.startswith(UPLOAD):
            found[reference] = {"remote": reference}
            continue
        digest = reference.removeprefix(UPLOAD)
        key = upload_key(project_id, digest)
        if bucket.stat(key) is None:
            raise NotFound(
                f"The uploaded package {digest[:12]}… has been deleted by the retention policy.", remedy=remedy
            )
        found[reference] = {"url": bucket.presign_get(key, URL_S), "sha256": digest}
    return found
