"""What moto's S3 lacks: ``ExpectedBucketOwner`` of GetBucketLocation. Patches moto when it is imported."""

from __future__ import annotations

from typing import Any

from moto.s3.exceptions import S3AccessDeniedError
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response

__all__ = ["s3_backends"]

_location = S3Response.get_bucket_location


def _of_the_owner(self: S3Response) -> Any:
    owner = self.headers.get("x-amz-expected-bucket-owner")
    if owner and s3_backends.bucket_accounts.get(self.bucket_name, ("", owner))[1] != owner:
        raise S3AccessDeniedError
    return _location(self)


S3Response.get_bucket_location = _of_the_owner  # type: ignore[method-assign]
