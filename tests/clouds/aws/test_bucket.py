"""What the contract's suite does not ask of S3: presigned URLs, parts, prefixes and errors."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from moto.s3.exceptions import S3AccessDeniedError

from clouds.aws import bucket as buckets
from clouds.aws.account.session import DURATION_S, SIGNER_S
from clouds.aws.setup import rights
from clouds.contract.errors import BadConfig, Denied, Gone
from heliostat.errors import InvalidRequest
from tests.clouds.aws.moto_iam import iam_backends
from tests.clouds.aws.support import Account, make_account
from tests.clouds.support import OURS

pytestmark = pytest.mark.long  # hundreds of calls to the fake of the whole cloud


def test_a_url_is_for_one_method_and_one_object(aws_account: Account) -> None:
    bucket = aws_account.bucket()
    put = bucket.presign_put("jobs/x+1.zip", 60)
    assert httpx.put(put, content=b"hello", headers={"content-type": "application/zip"}).status_code == 200
    assert bucket.get("jobs/x+1.zip") == b"hello"
    get = bucket.presign_get("jobs/x+1.zip", 60)
    assert httpx.get(get).content == b"hello"
    partly = httpx.get(get, headers={"range": "bytes=1-2"})
    assert (partly.status_code, partly.content) == (206, b"el")
    assert httpx.get(bucket.presign_get("nothing", 60)).status_code == 404
    for answer in (
        httpx.put(get, content=b"overwritten"),
        httpx.get(put),
        httpx.head(get),
        httpx.get(get.replace("x%2B1", "y")),
        httpx.get(get.replace("X-Amz-Expires=60", "X-Amz-Expires=600")),
        httpx.get(get[:-1] + ("0" if get[-1] != "0" else "1")),
        httpx.put(put, content=b"x", headers={"x-amz-acl": "public-read"}),
    ):
        assert answer.status_code == 403
    assert bucket.get("jobs/x+1.zip") == b"hello"


def test_a_url_expires(aws_account: Account) -> None:
    bucket = aws_account.bucket()
    bucket.put("a", b"x")
    url = bucket.presign_get("a", 1)
    deadline = time.monotonic() + 10
    while httpx.get(url).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx.get(url).status_code == 403


def test_only_the_bytes_announced(aws_account: Account) -> None:
    bucket, data = aws_account.bucket(), os.urandom(100_000)
    digest = hashlib.sha256(data).hexdigest()
    url, headers = bucket.presign_put("code.zip", 60, size=len(data), sha256=digest), bucket.put_headers(sha256=digest)
    wrong = bytes([data[0] ^ 1]) + data[1:]
    assert httpx.put(url, content=wrong, headers=headers).status_code == 400
    assert httpx.put(url, content=data[:-1], headers=headers).status_code == 403
    assert httpx.put(url, content=data).status_code == 403, "without the header S3 would not check the bytes"
    other = bucket.put_headers(sha256=hashlib.sha256(wrong).hexdigest())
    assert httpx.put(url, content=wrong, headers=other).status_code == 403
    assert bucket.stat("code.zip") is None
    assert httpx.put(url, content=data, headers=headers).status_code == 200
    assert bucket.get("code.zip") == data
    sized = bucket.presign_put("sized", 60, size=3)
    assert httpx.put(sized, content=b"four").status_code == 403
    assert httpx.put(sized, content=b"six").status_code == 200
    assert bucket.put_headers() == {}


def test_urls_last_as_long_as_they_say(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials end after an hour, and with them every URL that they have signed."""
    session = aws_account.session()
    first = session.signer(60)
    assert session.signer(DURATION_S) is first
    session._signer_ends = datetime.now(UTC) + timedelta(seconds=DURATION_S - SIGNER_S - 1)
    assert session.signer(600) is first
    second = session.signer(DURATION_S)
    assert second is not first
    assert session._signer_ends > datetime.now(UTC) + timedelta(seconds=DURATION_S - SIGNER_S)
    with pytest.raises(Denied, match="does not let the control plane assume"):
        aws_account.session(external_id="wrong").signer(60)


def test_large_objects_go_up_in_parts(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "PART", 5 * 2**20)
    bucket, data = aws_account.bucket(), os.urandom(11 * 2**20)
    bucket.put("large", data)
    assert bucket.get("large") == data
    s3 = aws_account.client("s3")
    assert s3.head_object(Bucket=aws_account.config.bucket, Key="large")["ETag"].endswith('-3"')
    monkeypatch.setattr(buckets, "PART", 2**20)  # S3 refuses such small parts
    with pytest.raises(BadConfig, match="EntityTooSmall"):
        bucket.put("large", data)
    assert bucket.get("large") == data
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=aws_account.config.bucket)


def test_prefixes_keep_installations_apart(aws_account: Account) -> None:
    one, two = (aws_account.bucket(prefix, bucket_prefix="heliostat/") for prefix in ("one/", "two/"))
    one.put("a/b", b"1")
    two.put("a/b", b"22")
    assert [(o.key, o.size) for o in one.list("a/")] == [("a/b", 1)]
    assert httpx.get(two.presign_get("a/b", 60)).content == b"22"
    one.delete(["a/b"])
    assert one.list("") == []
    listed = aws_account.client("s3").list_objects_v2(Bucket=aws_account.config.bucket)["Contents"]
    assert [o["Key"] for o in listed] == ["heliostat/two/a/b"]


def test_what_is_not_there_below_a_prefix_is_no_missing_right(moto_url: str) -> None:
    """A role that may list below a prefix alone is told 403 of it; a first upload asks whether it is there."""
    account = make_account(moto_url)
    below = account.config.model_copy(update={"bucket_prefix": "heliostat/"})
    policy = json.dumps(rights.role_policy(below, OURS, f"arn:aws:iam::{account.id}:role/heliostat-node"))
    iam_backends[account.id]["aws"].put_role_policy("heliostat", "heliostat", policy)
    bucket = account.bucket(bucket_prefix="heliostat/")
    bucket.put("a/b.zip", b"x")
    assert httpx.get(bucket.presign_get("a/b", 60)).status_code == 403, "as S3 says it"
    assert bucket.stat("a/b") is None
    with pytest.raises(Gone, match="a/b does not exist"):
        bucket.get("a/b")
    assert bucket.get("a/b.zip") == b"x"


def test_a_missing_right_on_what_is_there_is_told(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = aws_account.bucket()
    bucket.put("a/b", b"x")

    def denied(*_: Any, **__: Any) -> Any:
        raise S3AccessDeniedError

    monkeypatch.setattr("moto.s3.responses.S3Response.head_object", denied)
    with pytest.raises(Denied) as caught:
        bucket.stat("a/b")
    assert caught.value.details["action"] == "s3:GetObject"
    assert bucket.stat("a") is None


def test_lists_have_pages_and_deletes_batches(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "AT_ONCE", 4)
    bucket = aws_account.bucket()
    backend = aws_account.client("s3")
    keys = [f"logs/{i:04}" for i in range(10)]
    for key in keys:
        backend.put_object(Bucket=aws_account.config.bucket, Key=key, Body=b"x")
    session = aws_account.shared
    pages = session.pages("s3", "ListObjectsV2", "Contents", Bucket=aws_account.config.bucket, MaxKeys=3)
    assert [o["Key"] for o in pages] == keys
    bucket.delete(iter(keys))
    assert Counter(o.key for o in bucket.list("")) == {}


def test_a_bucket_that_is_not_there(aws_account: Account) -> None:
    bucket = aws_account.bucket()
    bucket._bucket = "no-such-bucket-anywhere"
    with pytest.raises(BadConfig, match="NoSuchBucket"):
        bucket.put("a", b"x")
    with pytest.raises(InvalidRequest):
        bucket.put("../a", b"x")
