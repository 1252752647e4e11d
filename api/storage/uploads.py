"""Code on its way to the bucket: the client PUTs it there by a presigned URL; we never see a byte of it."""

from __future__ import annotations

from fastapi import APIRouter, Request

from api.kit import lookup
from api.kit.auth import Me
from api.storage.buckets import bucket_of, in_bucket
from heliostat.errors import TooLarge
from heliostat.models.uploads import Upload, UploadCreate, upload_key

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

URL_S = 3600


@router.post("")
async def create(request: Request, me: Me, body: UploadCreate) -> Upload:
    """Where to PUT a zip of this hash and size. Content-addressed: the same one again is there already."""
    state = request.app.state
    project = me.project(body.project)
    limit = state.settings.upload_max_bytes
    if body.size > limit:
        raise TooLarge(
            f"The zip has {body.size / 2**20:.0f} MiB; uploads may have {limit / 2**20:.0f} MiB.",
            remedy="Leave files out with excludes; put large data into a bucket that the program reads.",
            field="size",
            details={"size": body.size, "limit": limit},
        )
    async with state.db.read() as conn:
        cloud = await lookup.cloud(conn, me, body.cloud)
    bucket = await bucket_of(state.buckets, cloud.id)
    key, uri = upload_key(project.id, body.sha256), f"upload:{body.sha256}"
    there = await in_bucket(lambda: bucket.stat(key))
    if there is not None and there.size == body.size:
        return Upload(uri=uri)
    url = await in_bucket(lambda: bucket.presign_put(key, URL_S, size=body.size, sha256=body.sha256))
    return Upload(uri=uri, url=url, headers=bucket.put_headers(sha256=body.sha256), expires_in_s=URL_S)
