"""What moto's S3 lacks: ``ExpectedBucketOwner`` of GetBucketLocation, and that an object which is not there is 403, not
404, to a role that may not list its bucket. Patches moto when it is imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from moto.s3.exceptions import MissingKey, S3AccessDeniedError
from moto.s3.models import s3_backends
from moto.s3.responses import S3Response
from moto.sts.models import sts_backends

from tests.clouds.aws.moto_iam import decision, iam_backends, statements_of

__all__ = ["s3_backends"]

_location, _get, _head = S3Response.get_bucket_location, S3Response.get_object, S3Response.head_object


def _of_the_owner(self: S3Response) -> Any:
    owner = self.headers.get("x-amz-expected-bucket-owner")
    if owner and s3_backends.bucket_accounts.get(self.bucket_name, ("", owner))[1] != owner:
        raise S3AccessDeniedError
    return _location(self)


def _may_list(self: S3Response) -> bool:
    """A read names no ``s3:prefix``, so a statement with a condition on it grants nothing here
    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html, "Permissions"). Whoever has no policy at all
    is a test's administrator."""
    given = self.headers.get("Authorization") or "".join(self.querystring.get("X-Amz-Credential", []))
    key = re.search(r"(?:Credential=|^)([A-Z0-9]+)/", given)
    assumed = (role for account in list(sts_backends.values()) for role in account["aws"].assumed_roles)
    arn = next((role.role_arn for role in assumed if key and role.access_key_id == key[1]), None)
    if arn is None:
        return True
    statements = statements_of(iam_backends[arn.split(":")[4]]["aws"].get_role_by_arn(arn))
    bucket = f"arn:aws:s3:::{self.bucket_name}"
    return not statements or decision(statements, "s3:ListBucket", bucket, {}) == "allowed"


def _told(read: Callable[..., Any]) -> Callable[..., Any]:
    def answer(self: S3Response, *args: Any, **kwargs: Any) -> Any:
        try:
            said = read(self, *args, **kwargs)
        except MissingKey:
            if _may_list(self):
                raise
            raise S3AccessDeniedError from None
        return (403, said[1], said[2]) if said[0] == 404 and not _may_list(self) else said

    return answer


S3Response.get_bucket_location = _of_the_owner  # type: ignore[method-assign]
S3Response.get_object = _told(_get)  # type: ignore[method-assign]
S3Response.head_object = _told(_head)  # type: ignore[method-assign]
