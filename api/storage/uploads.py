"""Uploads of code: the client PUTs a zip into the bucket with a presigned URL; no byte of it passes through here."""

from __future__ import annotations

from fastapi import APIRouter

from api.kit import lookup
from api.kit.auth import Me
from api.kit.context import Ctx
from api.storage.buckets import bucket_of, in_bucket
from heliostat.errors import TooLarge
from heliostat.models.uploads import Upload, UploadCreate, upload_key

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

URL_S = 3600


@router.post("")
async def create(ctx: Ctx, me: Me, body: UploadCreate) -> Upload:
    """The URL to PUT a zip of this hash and size to; none when the bucket has it already, since uploads are addressed
    by their content."""
    project = me.project(body.project)
    limit = ctx.settings.upload_max_bytes
    if body.size > limit:
        raise TooLarge(
            f"The zip has {body.size / 2**20:.0f} MiB; the limit of an upload is {limit / 2**20:.0f} MiB.",
            remedy="Leave out files with excludes; put large data into a bucket that the program reads.",
            field="size",
            details={"size": body.size, "limit": limit},
        )
    async with ctx.db.read() as conn:
        cloud = await lookup.cloud(conn, me, body.cloud)
    bucket = await bucket_of(ctx.buckets, cloud.id)
    key, uri = upload_key(project.id, body.sha256), f"upload:{body.sha256}"
    there = await in_bucket(lambda: bucket.stat(key))
    if there is not None and there.size == body.size:
        return Upload(uri=uri)
    url = await in_bucket(lambda: bucket.presign_put(key, URL_S, size=body.size, sha256=body.sha256))
    return Upload(uri=uri, url=url, headers=bucket.put_headers(sha256=body.sha256), expires_in_s=URL_S)
