"""The clouds' buckets, for requests. No byte of an object passes through here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from clouds.contract.bucket import Bucket
from heliostat.errors import NotFound, Unavailable

T = TypeVar("T")


async def bucket_of(buckets: Mapping[str, Bucket], cloud_id: str) -> Bucket:
    """Raises NotFound when this process has no bucket of the cloud."""
    bucket = buckets.get(cloud_id)
    if bucket is None:  # it may be new: on a thread, the live mapping reads the records
        bucket = await asyncio.to_thread(buckets.get, cloud_id)
    if bucket is None:
        raise NotFound(
            f"The bucket of cloud {cloud_id} is not available: the cloud was deleted, or belongs to another server.",
            remedy="What the jobs and clusters of a deleted cloud wrote is still in its bucket.",
            resource=cloud_id,
        )
    return bucket


async def in_bucket(work: Callable[[], T]) -> T:
    """Runs calls of a bucket on a thread; a disk error is Unavailable."""
    try:
        return await asyncio.to_thread(work)
    except OSError as e:
        raise Unavailable(
            f"The bucket fails: {e.strerror or e}.", remedy="Try again. If it persists, check the bucket and its disk."
        ) from e
