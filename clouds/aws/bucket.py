"""A cloud's bucket on S3: code and logs."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from typing import Any

from clouds.aws.account.errors import BotoCoreError, classify, translated
from clouds.aws.account.session import AwsSession
from clouds.contract.bucket import StoredObject
from clouds.contract.errors import Denied, Gone
from clouds.contract.object_keys import checked
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig

PART = 64 * 2**20
"""Bytes of one request: larger objects go up in parts, so that a broken connection costs one of them."""
AT_ONCE = 1000
"""Keys that one DeleteObjects takes."""


class AwsBucket:
    """Objects of one S3 bucket, under a prefix (``clouds.contract.bucket.Bucket``). S3 writes objects whole,
    and readers see the
    last write at once.

    Args:
        config: names the bucket and, in front of all else, its prefix.
        session: of the account whose role may read and write there.
        prefix: after the config's, e.g. of an installation or organization; ends in ``/`` unless it is empty.

    Where presigned URLs differ from the local bucket's:

    - ``sha256`` holds only for a PUT that carries the headers of ``put_headers``: S3 ignores a checksum that stands in
      the URL alone (aws/aws-sdk#480, aws/aws-sdk-go-v2#2610), so it is a signed header, and a PUT without it is
      refused (403). Other bytes are 400 (BadDigest).
    - Another ``size`` is 403 (the length is signed), and a body without a length 501.
    - A URL is for one method: a GET's is none for HEAD.
    - It ends with the credentials that signed it: one hour at most, 55 minutes at least if that much was requested.
    - A full disk does not exist. One PUT takes 5 GiB at most.
    """

    def __init__(self, config: AwsConfig, session: AwsSession, prefix: str = "") -> None:
        self._bucket, self._session = config.bucket, session
        self._prefix = config.bucket_prefix + prefix

    def put(self, key: str, data: bytes) -> None:
        checked(key)
        if len(data) > PART:
            self._put_in_parts(key, data)
        else:
            self._call("PutObject", key, Body=data)

    def get(self, key: str) -> bytes:
        checked(key)
        try:
            body: bytes = self._read("GetObject", key)["Body"].read()
        except Gone:
            raise Gone(
                f"Object {key} does not exist.",
                remedy="It may have been deleted by the retention policy.",
                resource=key,
            ) from None
        except BotoCoreError as e:  # the connection broke while the object came
            raise translated(e, "s3", "GetObject", key, self._session.role_arn) from e
        return body

    def stat(self, key: str) -> StoredObject | None:
        checked(key)
        try:
            found = self._read("HeadObject", key)
        except Gone:
            return None
        return StoredObject(key=key, size=found["ContentLength"], modified_at=found["LastModified"])

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        more = {"StartAfter": self._prefix + start_after} if start_after else {}
        found = self._session.pages(
            "s3", "ListObjectsV2", "Contents", self._bucket, Bucket=self._bucket, Prefix=self._prefix + prefix, **more
        )
        cut = len(self._prefix)
        return [StoredObject(key=o["Key"][cut:], size=o["Size"], modified_at=o["LastModified"]) for o in found]

    def delete(self, keys: Iterable[str]) -> None:
        for some in _some(dict.fromkeys(keys)):
            for key in some:
                checked(key)
            objects = {"Objects": [{"Key": self._prefix + key} for key in some], "Quiet": True}
            answer = self._session.call("s3", "DeleteObjects", self._bucket, Bucket=self._bucket, Delete=objects)
            for error in answer.get("Errors", []):
                kind = classify(error.get("Code", ""))
                if kind is not Gone:
                    raise kind(
                        f"AWS did not delete {error.get('Key')} ({error.get('Code')}): {error.get('Message')}",
                        remedy="The call is safe to repeat.",
                        resource=self._bucket,
                    )

    def presign_get(self, key: str, expires_in_s: int) -> str:
        return self._presign("get_object", key, expires_in_s, {})

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        more: dict[str, Any] = {} if size is None else {"ContentLength": size}
        if sha256 is not None:
            more["ChecksumSHA256"] = _base64(sha256)
        return self._presign("put_object", key, expires_in_s, more)

    def put_headers(self, *, sha256: str | None = None) -> dict[str, str]:
        """What a PUT to ``presign_put``'s URL must carry beside its length."""
        return {} if sha256 is None else {"x-amz-checksum-sha256": _base64(sha256)}

    def _presign(self, method: str, key: str, expires_in_s: int, more: dict[str, Any]) -> str:
        checked(key)
        arguments = {"Bucket": self._bucket, "Key": self._prefix + key, **more}
        url: str = self._session.signer(expires_in_s).generate_presigned_url(
            method, Params=arguments, ExpiresIn=expires_in_s
        )
        return url

    def _put_in_parts(self, key: str, data: bytes) -> None:
        upload = self._call("CreateMultipartUpload", key)["UploadId"]
        try:
            parts = [
                {
                    "PartNumber": number,
                    "ETag": self._call("UploadPart", key, UploadId=upload, PartNumber=number, Body=part)["ETag"],
                }
                for number, part in enumerate(_parts(data), 1)
            ]
            self._call("CompleteMultipartUpload", key, UploadId=upload, MultipartUpload={"Parts": parts})
        except CloudError:
            try:
                self._call("AbortMultipartUpload", key, UploadId=upload)
            except CloudError:
                pass  # the first error is the one to tell; a lifecycle rule of the bucket ends what is left
            raise

    def _read(self, operation: str, key: str) -> dict[str, Any]:
        """S3 says 403 of an object that is not there to a role that may not list the bucket
        (https://docs.aws.amazon.com/AmazonS3/latest/API/API_HeadObject.html), and one that may list below a prefix
        alone is such a role, since a read names no prefix. So that is looked at before a right is called missing."""
        try:
            return self._call(operation, key)
        except Denied:
            if self._is_there(key):
                raise
            raise Gone(f"Object {key} does not exist.", resource=key) from None

    def _is_there(self, key: str) -> bool:
        name = self._prefix + key  # the first of all names that begin with it
        arguments = {"Bucket": self._bucket, "Prefix": name, "MaxKeys": 1}
        answer = self._session.call("s3", "ListObjectsV2", self._bucket, **arguments)
        return any(found["Key"] == name for found in answer.get("Contents", []))

    def _call(self, operation: str, key: str, **arguments: Any) -> dict[str, Any]:
        return self._session.call("s3", operation, key, Bucket=self._bucket, Key=self._prefix + key, **arguments)


def _parts(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PART):
        yield data[start : start + PART]


def _some(keys: Iterable[str]) -> Iterator[list[str]]:
    listed = list(keys)
    for start in range(0, len(listed), AT_ONCE):
        yield listed[start : start + AT_ONCE]


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode()
