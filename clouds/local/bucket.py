"""The ``local`` cloud's bucket: a directory, and signed URLs that ``clouds.local.bucket_server`` honours."""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote, urlencode

from clouds.base import BadConfig, Gone, QuotaExceeded, StoredObject
from heliostat.errors import InvalidRequest, PermissionDenied

KEY_MAX = 1024
_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=@+,:~-]{1,255}")
LEFTOVER_S = 24 * 3600
"""Older parts of uploads belong to writers that have died: no upload takes a day."""


@dataclass(frozen=True)
class Grant:
    """What a signed URL allows: these bytes, or any where None."""

    size: int | None
    sha256: str | None


class LocalBucket:
    """Objects as files under ``root/objects`` (``clouds.base.Bucket``).

    Args:
        root: made when missing. Several processes may share it.
        url: where the bucket's server answers, e.g. ``http://127.0.0.1:8701``.
        key: signs URLs; the server must have the same.
        quota_bytes: stands in for a full disk; None: the disk's own limit.

    One difference from S3: a key can't be both an object and the folder of another (BadConfig).
    """

    def __init__(self, root: Path, url: str, key: bytes, *, quota_bytes: int | None = None) -> None:
        self._objects, self._parts = root.resolve() / "objects", root.resolve() / "parts"
        self._url, self._key, self._quota = url.rstrip("/"), key, quota_bytes
        for folder in (self._objects, self._parts):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, key: str, data: bytes) -> None:
        with self.incoming(key) as incoming:
            incoming.write(data)

    def incoming(self, key: str) -> Incoming:
        """For bodies that should not sit in memory: ``with bucket.incoming(key) as i: i.write(chunk)``. The object
        appears, whole, when the block ends well. Raises QuotaExceeded when the disk is full."""
        room = None if self._quota is None else self._quota - self._used_bytes()
        return Incoming(self.path(key), self._parts, key, room)

    def get(self, key: str) -> bytes:
        try:
            return self.path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Gone(f"Object {key} does not exist.", remedy="It may have been pruned.", resource=key) from None

    def stat(self, key: str) -> StoredObject | None:
        return self._stat(key, self.path(key))

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        folder = self._objects / prefix.rpartition("/")[0]
        if not folder.resolve().is_relative_to(self._objects):
            raise InvalidRequest(f"{prefix!r} is no prefix of object keys.", field="prefix")
        found = []
        for where, _, names in os.walk(folder):
            for name in names:
                path = Path(where) / name
                key = path.relative_to(self._objects).as_posix()
                if key.startswith(prefix) and key > start_after:
                    found.append((key, path))
        stats = (self._stat(key, path) for key, path in sorted(found))
        return [stat for stat in stats if stat is not None]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.path(key)
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            for folder in path.parents:
                try:
                    if folder == self._objects:
                        break
                    folder.rmdir()
                except OSError:  # not empty, or another one removed it
                    break

    def presign_get(self, key: str, expires_in_s: int) -> str:
        return self._presign("GET", key, expires_in_s, None, None)

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        return self._presign("PUT", key, expires_in_s, size, sha256)

    def verify(self, method: str, key: str, query: Mapping[str, str]) -> Grant:
        """What the query string of a signed URL allows. Raises PermissionDenied."""
        expires, size, sha256 = query.get("expires", ""), query.get("size", ""), query.get("sha256", "")
        expected = self._signature("GET" if method == "HEAD" else method, key, expires, size, sha256)
        given = query.get("signature", "")
        if not hmac.compare_digest(expected.encode(), given.encode()):
            raise PermissionDenied(
                f"The signature does not allow to {method} {key}.", remedy="Ask for a new URL.", resource=key
            )
        if time.time() > int(expires):
            raise PermissionDenied(f"The URL of {key} has expired.", remedy="Ask for a new URL.", resource=key)
        return Grant(int(size) if size else None, sha256 or None)

    def path(self, key: str) -> Path:
        """The object's file. Raises InvalidRequest for what is no key; nothing outside the bucket has one."""
        segments = key.split("/")
        if len(key) > KEY_MAX or not all(_SEGMENT.fullmatch(s) and s not in (".", "..") for s in segments):
            raise InvalidRequest(
                f"{key[:100]!r} is no object key.",
                remedy="Use letters, digits and !_.*'()=@+,:~- in segments of up to 255, parted by '/'.",
                field="key",
            )
        return self._objects.joinpath(*segments)

    def remove_leftovers(self) -> None:
        """Parts of uploads whose writer has died."""
        for part in self._parts.iterdir():
            if time.time() - part.stat().st_mtime > LEFTOVER_S:
                part.unlink(missing_ok=True)

    def _presign(self, method: str, key: str, expires_in_s: int, size: int | None, sha256: str | None) -> str:
        self.path(key)
        query = {"expires": str(int(time.time()) + expires_in_s)}
        if size is not None:
            query["size"] = str(size)
        if sha256 is not None:
            query["sha256"] = sha256
        signature = self._signature(method, key, query["expires"], query.get("size", ""), query.get("sha256", ""))
        return f"{self._url}/objects/{quote(key)}?{urlencode(query | {'signature': signature})}"

    def _signature(self, method: str, key: str, expires: str, size: str, sha256: str) -> str:
        text = json.dumps([method, key, expires, size, sha256])
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()

    def _stat(self, key: str, path: Path) -> StoredObject | None:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not path.is_file():
            return None
        return StoredObject(key=key, size=found.st_size, modified_at=datetime.fromtimestamp(found.st_mtime, UTC))

    def _used_bytes(self) -> int:
        total = 0
        for where, _, names in os.walk(self._objects.parent):
            for name in names:
                with suppress(FileNotFoundError):  # replaced or deleted while we look
                    total += (Path(where) / name).stat().st_size
        return total


class Incoming:
    """An object on its way: bytes go to a file beside the objects, which takes its name when all are there."""

    def __init__(self, path: Path, parts: Path, key: str, room: int | None) -> None:
        self.size = 0
        self._committed = False
        self._hash = hashlib.sha256()
        self._path, self._key, self._room = path, key, room
        fd, name = tempfile.mkstemp(dir=parts)
        self._part, self._file = Path(name), os.fdopen(fd, "wb", buffering=0)

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self._hash.update(data)
        if self._room is not None and self.size > self._room:
            raise self._full()
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            raise self._full() if e.errno in (errno.ENOSPC, errno.EDQUOT) else e from e

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        try:
            if kind is None and not self._committed:
                self.commit()
        finally:
            self._file.close()
            self._part.unlink(missing_ok=True)

    def commit(self) -> None:
        """Makes it the object, durably. The end of the ``with`` block does it unless it was done."""
        try:
            os.fsync(self._file.fileno())
            while True:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self._part.replace(self._path)
                    break
                except FileNotFoundError:
                    continue  # a delete beside us removed the folder, which it found empty
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            self._committed = True
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise BadConfig(
                f"Object {self._key} can't be written: an object and a folder would have one name.",
                remedy="Use another key.",
                resource=self._key,
            ) from None
        except OSError as e:
            raise self._full() if e.errno in (errno.ENOSPC, errno.EDQUOT) else e from e

    def _full(self) -> QuotaExceeded:
        return QuotaExceeded(
            f"The bucket's disk is full: {self._key} can't be written.",
            remedy="Free disk space where the bucket lies, or lower the retention of logs and uploads.",
            resource=self._key,
        )
