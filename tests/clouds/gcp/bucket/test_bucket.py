"""The contract of ``clouds.contract.bucket.Bucket`` (``tests/clouds/contract/test_bucket.py``) on Cloud
Storage's fake, which checks V4
signatures with the public key of the account that signed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from clouds.contract.errors import BadConfig, Denied
from clouds.gcp.bucket.bucket import GcpBucket
from heliostat.errors import CloudError, InvalidRequest
from tests.clouds.contract.test_bucket import (
    NO_KEYS,
    test_delete_is_repeatable,
    test_list_is_in_key_order,
    test_objects_are_what_was_put_last,
    test_put_and_delete_at_once,
    test_ranges,
    test_readers_never_see_half,
    test_what_does_not_exist,
)
from tests.clouds.gcp.support import ACCOUNT, config, session
from tests.clouds.gcp.support import served as on_stage
from tests.lab.gce import GceFake

pytestmark = pytest.mark.long  # hundreds of calls to the fake of the whole cloud

__all__ = [
    "test_delete_is_repeatable",
    "test_list_is_in_key_order",
    "test_objects_are_what_was_put_last",
    "test_put_and_delete_at_once",
    "test_ranges",
    "test_readers_never_see_half",
    "test_what_does_not_exist",
]
"""Of the suite, what is not about a disk or the form of our own URLs."""


@pytest.fixture(scope="module")
def google() -> tuple[GceFake, str]:
    fake = GceFake()
    fake.auth.add_account(ACCOUNT)
    return fake, on_stage(fake)


@pytest.fixture
def fake(google: tuple[GceFake, str]) -> GceFake:
    google[0].storage.objects.clear()
    google[0].storage.calls.clear()
    return google[0]


@pytest.fixture
def bucket(fake: GceFake, google: tuple[GceFake, str]) -> GcpBucket:
    return GcpBucket(config(bucket_prefix="heliostat/"), session(google[1]), "org_1/")


@pytest.fixture
def served(bucket: GcpBucket) -> GcpBucket:
    return bucket


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key(bucket: GcpBucket, key: str) -> None:
    for call in (bucket.get, lambda k: bucket.put(k, b"x"), lambda k: bucket.presign_put(k, 60)):
        with pytest.raises(InvalidRequest):
            call(key)


def test_all_of_it_is_below_the_prefix(bucket: GcpBucket, fake: GceFake) -> None:
    fake.storage.objects["other/x"] = (b"theirs", time.time())
    bucket.put("a", b"1")
    assert set(fake.storage.objects) == {"other/x", "heliostat/org_1/a"}
    assert [o.key for o in bucket.list("")] == ["a"]


def test_a_long_list_has_pages(bucket: GcpBucket, fake: GceFake) -> None:
    fake.storage.page = 3
    keys = [f"logs/{i:02}" for i in range(10)]
    for key in keys:
        bucket.put(key, b"x")
    assert [o.key for o in bucket.list("logs/")] == keys
    assert [o.key for o in bucket.list("logs/", start_after="logs/03")] == keys[4:]
    fake.storage.page = 1000


def test_signed_urls_carry_the_right_to_one_object(bucket: GcpBucket) -> None:
    key = "jobs/x+1=(a),b.zip"
    url = bucket.presign_put(key, 60)
    assert httpx.put(url, content=b"hello", headers={"content-type": "application/zip"}).status_code == 200
    assert bucket.get(key) == b"hello"
    get = bucket.presign_get(key, 60)
    answer = httpx.get(get)
    assert (answer.status_code, answer.content) == (200, b"hello")
    head = httpx.head(get)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "5", b"")
    assert httpx.get(bucket.presign_get("nothing", 60)).status_code == 404
    for forged in (
        get.replace("jobs/x", "jobs/y"),
        get.replace("X-Goog-Expires=60", "X-Goog-Expires=61"),
        get[:-1] + ("0" if get[-1] != "0" else "1"),
        get.split("?")[0],
        url,  # a PUT's URL does not read
    ):
        assert httpx.get(forged).status_code == 403, forged
    assert httpx.put(get, content=b"overwritten").status_code == 403, "a GET's URL does not write"
    assert httpx.delete(get).status_code == 403
    assert httpx.put(url, content=b"x", headers={"x-goog-acl": "public-read"}).status_code == 403
    assert bucket.get(key) == b"hello"


def test_expired(bucket: GcpBucket) -> None:
    bucket.put("a", b"x")
    assert httpx.get(bucket.presign_get("a", -1)).status_code == 403
    assert httpx.put(bucket.presign_put("a", -1), content=b"y").status_code == 403
    assert bucket.get("a") == b"x"
    assert "X-Goog-Expires=604800" in bucket.presign_get("a", 10**9), "Google's limit"


def test_only_as_many_bytes_as_announced(bucket: GcpBucket) -> None:
    data = b"abc" * 10_000
    url = bucket.presign_put("code.zip", 60, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def chunked(body: bytes) -> Iterator[bytes]:
        yield from (body[i : i + 10_000] for i in range(0, len(body), 10_000))

    for content in (data[:-1], data + b"x", chunked(data)):
        assert httpx.put(url, content=content).status_code == 403
    assert bucket.stat("code.zip") is None
    assert httpx.put(url, content=data, headers={"content-type": "application/zip"}).status_code == 200
    assert bucket.get("code.zip") == data
    with pytest.raises(InvalidRequest):
        bucket.presign_put("code.zip", 60, sha256="nonsense")


def test_what_may_be_tried_again_is(bucket: GcpBucket, fake: GceFake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clouds.gcp.bucket.bucket.BACK_OFF_S", 0.001)
    fake.storage.faults += [503, 429]
    bucket.put("a", b"x")
    assert fake.storage.calls["insert"] == 3
    fake.storage.faults += [503] * 3
    with pytest.raises(CloudError):
        bucket.get("a")
    fake.storage.faults.append(403)
    with pytest.raises(Denied):
        bucket.get("a")
    assert fake.storage.faults == []


def test_a_bucket_that_is_not_there(google: tuple[GceFake, str]) -> None:
    absent = GcpBucket(config(bucket="somebody-elses"), session(google[1]))
    calls: list[Any] = [
        lambda: absent.put("a", b"x"),
        lambda: absent.get("a"),
        lambda: absent.list(""),
        lambda: absent.stat("a"),
        lambda: absent.delete(["a"]),
    ]
    for call in calls:
        with pytest.raises(BadConfig, match="somebody-elses"):
            call()


def test_who_may_not_sign(google: tuple[GceFake, str]) -> None:
    theirs = {"service_account": "others@acme-prod-1.iam.gserviceaccount.com"}
    other = GcpBucket(config(**theirs), session(google[1], **theirs))
    with pytest.raises(Denied) as caught:
        other.presign_get("a", 60)
    assert caught.value.details["permission"] == "iam.serviceAccounts.signBlob"
