"""The clouds' buckets, as requests reach them. No byte of an object passes through here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from clouds.contract.bucket import Bucket
from heliostat.errors import NotFound, Unavailable

T = TypeVar("T")


async def bucket_of(buckets: Mapping[str, Bucket], cloud_id: str) -> Bucket:
    """Raises NotFound when the cloud is not served here."""
    bucket = buckets.get(cloud_id)
    if bucket is None:  # it may be new: on a thread the live mapping reads the records
        bucket = await asyncio.to_thread(buckets.get, cloud_id)
    if bucket is None:
        raise NotFound(
            f"The bucket of cloud {cloud_id} is not served: the cloud was deleted, or it is another server's own.",
            remedy="What a deleted cloud's jobs and clusters wrote is in its bucket still.",
            resource=cloud_id,
        )
    return bucket


async def in_bucket(work: Callable[[], T]) -> T:
    """Runs calls of a bucket on a thread; an error of its disk is Unavailable."""
    try:
        return await asyncio.to_thread(work)
    except OSError as e:
        raise Unavailable(
            f"The bucket fails: {e.strerror or e}.", remedy="Try again; if it goes on, see the bucket and its disk."
        ) from e
