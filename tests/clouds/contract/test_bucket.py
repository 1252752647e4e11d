"""The contract of ``clouds.contract.bucket.Bucket``, on every implementation, its URLs over real HTTP."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from clouds.contract.bucket import Bucket
from clouds.contract.errors import BadConfig, Gone, QuotaExceeded
from clouds.fake.machines import FakeBucket
from clouds.local.bucket.bucket import LocalBucket
from clouds.local.machines import host
from heliostat.errors import InvalidRequest
from runtime.keys import load_or_create
from tests.clouds.support import ROOT, eventually, serving

KEY = b"k" * 32


def make(kind: str, folder: Path, url: str = "", quota: int | None = None) -> Any:
    return FakeBucket(url, quota_bytes=quota) if kind == "fake" else LocalBucket(folder, url, KEY, quota_bytes=quota)


@pytest.fixture(params=["fake", "local", "aws"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "aws":
        return request.getfixturevalue("aws_account").bucket("test/")
    return make(request.param, tmp_path / "bucket")


@pytest.fixture(params=["fake", "local"])
def served(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """A bucket whose URLs are being honoured."""
    first = make(request.param, tmp_path / "bucket")
    with serving(first) as url:
        first._url = url
        yield first


def test_objects_are_what_was_put_last(bucket: Bucket) -> None:
    bucket.put("a/b.txt", b"one")
    bucket.put("a/b.txt", b"second")
    assert bucket.get("a/b.txt") == b"second"
    found = bucket.stat("a/b.txt")
    assert found is not None
    assert (found.key, found.size, found.modified_at.tzinfo is not None) == ("a/b.txt", 6, True)
    bucket.put("empty", b"")
    assert bucket.get("empty") == b""


def test_what_does_not_exist(bucket: Bucket) -> None:
    bucket.put("a/b", b"x")
    for key in ("nothing", "a", "a/b/c", "a/c"):
        assert bucket.stat(key) is None
        with pytest.raises(Gone, match=key):
            bucket.get(key)


def test_list_is_in_key_order(bucket: Bucket) -> None:
    keys = ["logs/a-b/1", "logs/a/00", "logs/a/01", "logs/a/02", "logs/a.b", "other/x"]
    for key in reversed(keys):
        bucket.put(key, key.encode())
    assert [o.key for o in bucket.list("")] == sorted(keys)
    assert [o.key for o in bucket.list("logs/a/")] == ["logs/a/00", "logs/a/01", "logs/a/02"]
    assert [o.key for o in bucket.list("logs/a")] == sorted(k for k in keys if k.startswith("logs/a"))
    assert [o.key for o in bucket.list("logs/a/", start_after="logs/a/00")] == ["logs/a/01", "logs/a/02"]
    assert [o.size for o in bucket.list("other/")] == [7]
    assert bucket.list("no/such/") == []


def test_delete_is_repeatable(bucket: Bucket) -> None:
    bucket.put("a/b/c", b"x")
    bucket.put("a/d", b"y")
    bucket.delete(["a/b/c", "a/b/c", "never/was"])
    assert [o.key for o in bucket.list("")] == ["a/d"]
    bucket.delete(["a/d"])
    assert bucket.list("") == []
    bucket.put("a", b"where a folder was")
    assert bucket.get("a") == b"where a folder was"


NO_KEYS = ["", "/", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/./b", "a\0b", "x" * 2000]


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key(bucket: Bucket, key: str) -> None:
    for call in (bucket.get, lambda k: bucket.put(k, b"x"), lambda k: bucket.presign_put(k, 60)):
        with pytest.raises(InvalidRequest):
            call(key)


def test_readers_never_see_half(bucket: Bucket) -> None:
    """One writer, whose objects are each of one letter."""
    size, stop = 300_000, threading.Event()
    bucket.put("log", b"a" * size)

    def write() -> None:
        for i in range(60):
            bucket.put("log", bytes([97 + i % 26]) * size)
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        data = bucket.get("log")
        assert len(data) == size
        assert len(set(data)) == 1
    writer.join()


def test_put_and_delete_at_once(bucket: Bucket) -> None:
    """A delete removes the folder that a put has just made: the put makes it again."""
    errors: list[BaseException] = []

    def repeat(call: Any) -> None:
        try:
            for _ in range(20 if type(bucket).__name__ == "AwsBucket" else 200):  # each is a request over HTTP there
                call()
        except BaseException as e:
            errors.append(e)

    calls = [lambda: bucket.put("deep/er/x", b"1"), lambda: bucket.delete(["deep/er/x"])]
    threads = [threading.Thread(target=repeat, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    bucket.put("deep/er/x", b"2")
    assert bucket.get("deep/er/x") == b"2"


def test_a_full_disk(tmp_path: Path) -> None:
    for kind in ("fake", "local"):
        bucket = make(kind, tmp_path / kind, quota=100)
        bucket.put("a", b"x" * 60)
        with pytest.raises(QuotaExceeded, match="full"):
            bucket.put("b", b"x" * 60)
        assert [o.key for o in bucket.list("")] == ["a"], "nothing of it stays"
        bucket.delete(["a"])
        bucket.put("b", b"x" * 60)


# -- signed URLs


def test_signed_urls_carry_the_right_to_one_object(served: Any) -> None:
    url = served.presign_put("jobs/x 1.zip".replace(" ", "+"), 60)
    assert httpx.put(url, content=b"hello").status_code == 200
    assert served.get("jobs/x+1.zip") == b"hello"
    get = served.presign_get("jobs/x+1.zip", 60)
    answer = httpx.get(get)
    assert (answer.status_code, answer.content) == (200, b"hello")
    head = httpx.head(get)
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "5", b"")
    assert httpx.get(served.presign_get("nothing", 60)).status_code == 404

    for forged in (
        get.replace("x%2B1", "y"),
        get.replace("expires=", "expires=9"),
        get[:-1] + ("0" if get[-1] != "0" else "1"),
        get.split("?")[0],
        get.split("&signature")[0],
        url,  # a PUT's URL does not read
        get.replace("jobs/", "jobs/%2e%2e/%2e%2e/"),
    ):
        answer = httpx.get(forged)
        assert answer.status_code == 403, forged
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "permission_denied"
    assert httpx.put(get, content=b"overwritten").status_code == 403, "a GET's URL does not write"
    assert httpx.delete(get).status_code == 405
    assert served.get("jobs/x+1.zip") == b"hello"


def test_expired(served: Any) -> None:
    served.put("a", b"x")
    read = httpx.get(served.presign_get("a", -1))
    written = httpx.put(served.presign_put("a", -1), content=b"y" * 10**6)
    for answer in (read, written):
        assert answer.status_code == 403
        assert "expired" in answer.json()["detail"]
        assert answer.json()["remedy"]
    assert served.get("a") == b"x"


def test_only_the_bytes_announced(served: Any) -> None:
    data = os.urandom(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    url = served.presign_put("code.zip", 60, size=len(data), sha256=digest)

    def chunked(body: bytes) -> Iterator[bytes]:
        """Without a content-length."""
        yield from (body[i : i + 100_000] for i in range(0, len(body), 100_000))

    wrong = bytearray(data)
    wrong[1_000_000] ^= 1
    for body in (data[:-1], data + b"x", bytes(wrong)):
        for content in (body, chunked(body)):
            answer = httpx.put(url, content=content)
            assert answer.status_code == 400, answer.text
            assert "code.zip" in answer.json()["detail"]
    assert served.stat("code.zip") is None
    assert httpx.put(url.replace(digest, hashlib.sha256(wrong).hexdigest()), content=bytes(wrong)).status_code == 403
    assert httpx.put(url, content=chunked(data)).status_code == 200
    assert httpx.put(url, content=data).status_code == 200
    assert served.get("code.zip") == data


@pytest.mark.parametrize(
    ("header", "status", "content", "content_range"),
    [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-30", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, b"", "bytes */10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ],
)
def test_ranges(served: Any, header: str, status: int, content: bytes, content_range: str | None) -> None:
    served.put("log", b"0123456789")
    answer = httpx.get(served.presign_get("log", 60), headers={"range": header})
    assert (answer.status_code, answer.content, answer.headers.get("content-range")) == (status, content, content_range)


def test_a_full_disk_over_http(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "quota_bytes" if isinstance(served, FakeBucket) else "_quota", 3_000_000)
    answer = httpx.put(served.presign_put("big", 60), content=b"x" * 8_000_000)
    assert answer.status_code == 507, answer.text
    assert answer.json()["code"] == "quota_exceeded"
    assert answer.json()["remedy"]
    assert served.list("") == []
    assert httpx.put(served.presign_put("small", 60), content=b"x").status_code == 200


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    bucket = make("local", tmp_path)
    with serving(bucket) as url:
        bucket._url = url
        target = httpx.URL(bucket.presign_put("half", 60))
        with socket.create_connection((target.host, target.port)) as connection:
            head = f"PUT {target.raw_path.decode()} HTTP/1.1\r\nhost: x\r\ncontent-length: 5000000\r\n\r\n"
            connection.sendall(head.encode() + b"x" * 2_500_000)
            eventually(lambda: list((tmp_path / "parts").iterdir()))
        eventually(lambda: not list((tmp_path / "parts").iterdir()))
    assert bucket.list("") == []


# -- the local bucket alone


def test_a_key_is_an_object_or_a_folder(tmp_path: Path) -> None:
    bucket = make("local", tmp_path)
    bucket.put("a/b", b"x")
    for key in ("a", "a/b/c"):
        with pytest.raises(BadConfig, match=key):
            bucket.put(key, b"y")
    assert bucket.get("a/b") == b"x"
    assert not list((tmp_path / "parts").iterdir())


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    bucket = make("local", tmp_path)
    old, new = tmp_path / "parts" / "old", tmp_path / "parts" / "new"
    for part in (old, new):
        part.write_bytes(b"x")
    os.utime(old, (0, 0))
    bucket.remove_leftovers()
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["new"]


@contextmanager
def server_process(home: Path, *before: str, **env: str) -> Iterator[tuple[LocalBucket, subprocess.Popen[bytes]]]:
    """``python -m clouds.local.bucket.server`` as the stack starts it, and a bucket that signs for it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bucket = LocalBucket(home / "bucket", f"http://127.0.0.1:{port}", load_or_create(home).bucket_key())
    given = {**os.environ, "HELIOSTAT_HOME": str(home), "HELIOSTAT_BUCKET_PORT": str(port), **env}
    process = subprocess.Popen([*before, sys.executable, "-m", "clouds.local.bucket.server"], cwd=ROOT, env=given)
    try:
        eventually(lambda: process.poll() is not None or _answers(f"http://127.0.0.1:{port}/healthz"))
        assert process.poll() is None
        yield bucket, process
    finally:
        process.terminate()
        assert process.wait(20) in (0, -15)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _put_and_watch_memory(bucket: LocalBucket, process: subprocess.Popen[bytes], size: int) -> int:
    """Peak of the server's resident memory in MiB."""

    def body() -> Iterator[bytes]:
        block = b"x" * 2**20
        yield from (block for _ in range(size // len(block)))

    headers = {"content-length": str(size)}
    url = bucket.presign_put("big.zip", 600, size=size)
    assert httpx.put(url, content=body(), headers=headers, timeout=600).status_code == 200
    with httpx.stream("GET", bucket.presign_get("big.zip", 600), timeout=600) as answer:
        assert sum(len(chunk) for chunk in answer.iter_raw()) == size
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


@pytest.mark.long
def test_the_server_holds_no_body_in_memory(tmp_path: Path) -> None:
    with server_process(tmp_path) as (bucket, process):
        assert _put_and_watch_memory(bucket, process, 256 * 2**20) < 128


@pytest.mark.long
def test_three_gibibytes_in_small_memory(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 4 * 2**30:
        pytest.skip("needs 4 GiB of disk")
    with server_process(tmp_path) as (bucket, process):
        assert _put_and_watch_memory(bucket, process, 3 * 2**30) < 128


@pytest.mark.long
def test_the_servers_quota_setting(tmp_path: Path) -> None:
    with server_process(tmp_path, HELIOSTAT_BUCKET_QUOTA_BYTES="1000") as (bucket, _):
        assert httpx.put(bucket.presign_put("a", 60), content=b"x" * 2000).status_code == 507
        assert httpx.put(bucket.presign_put("a", 60), content=b"x" * 500).status_code == 200


@pytest.mark.long
@pytest.mark.skipif(not host.namespaces_work(), reason="needs a mount namespace for a small disk of its own")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """The server on a file system of 4 MiB."""
    mount = f'mount -t tmpfs -o size=4m none "{tmp_path}/bucket" && exec "$@"'
    with server_process(tmp_path, "unshare", "-U", "-r", "-m", "sh", "-c", mount, "sh") as (bucket, _):
        answer = httpx.put(bucket.presign_put("big", 60), content=b"x" * 20_000_000)
        assert answer.status_code == 507, answer.text
        assert "full" in answer.json()["detail"]
        assert httpx.put(bucket.presign_put("small", 60), content=b"x" * 1_000_000).status_code == 200, "it was undone"
