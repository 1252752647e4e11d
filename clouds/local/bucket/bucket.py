"""The ``local`` cloud's bucket: a directory, and signed URLs that ``clouds.local.bucket.server`` accepts."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from clouds.contract.bucket import StoredObject
from clouds.contract.errors import BadConfig, Gone, QuotaExceeded
from clouds.contract.object_keys import checked
from clouds.signed_urls import SignedUrls
from heliostat.errors import InvalidRequest

LEFTOVER_S = 24 * 3600
"""Older parts of uploads belong to writers that have died: no upload takes a day."""


class LocalBucket(SignedUrls):
    """Objects as files under ``root/objects`` (``clouds.contract.bucket.Bucket``).

    Args:
        root: made when missing. Several processes may share it.
        url: where the bucket's server answers, e.g. ``http://127.0.0.1:8701``.
        key: signs URLs; the server must have the same.
        quota_bytes: simulates a full disk; None: the disk's own limit.

    One difference from S3: a key cannot be both an object and the folder of another (BadConfig).
    """

    def __init__(self, root: Path, url: str, key: bytes, *, quota_bytes: int | None = None) -> None:
        self._objects, self._parts = root.resolve() / "objects", root.resolve() / "parts"
        super().__init__(url, key)
        self._quota = quota_bytes
        for folder in (self._objects, self._parts):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def put(self, key: str, data: bytes) -> None:
        with self.incoming(key) as incoming:
            incoming.write(data)

    def incoming(self, key: str) -> Incoming:
        """For bodies that should not sit in memory: ``with bucket.incoming(key) as i: i.write(chunk)``. The object
        appears, whole, when the block ends well. Raises QuotaExceeded when the disk is full."""
        room = None if self._quota is None else self._quota - self._used_bytes()
        return Incoming(self._path(key), self._parts, key, room)

    def get(self, key: str) -> bytes:
        with self.open(key) as f:
            return f.read()

    def stat(self, key: str) -> StoredObject | None:
        return self._stat(key, self._path(key))

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        folder = self._objects / prefix.rpartition("/")[0]
        if not folder.resolve().is_relative_to(self._objects):
            raise InvalidRequest(f"{prefix!r} is not a valid prefix of object keys.", field="prefix")
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
            path = self._path(key)
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

    def open(self, key: str) -> BinaryIO:
        """The object as it is now, whatever replaces it while it is read. Raises Gone."""
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise Gone(
                f"Object {key} does not exist.",
                remedy="It may have been deleted by the retention policy.",
                resource=key,
            ) from None

    def remove_leftovers(self) -> None:
        """Parts of uploads whose writer has died."""
        for part in self._parts.iterdir():
            if time.time() - part.stat().st_mtime > LEFTOVER_S:
                part.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._objects.joinpath(*checked(key))

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
    """An object on its way: bytes go to a separate file, which takes its name when all are there."""

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
                    continue  # a concurrent delete removed the folder, which it found empty
            folder = os.open(self._path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            self._committed = True
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            raise BadConfig(
                f"Object {self._key} cannot be written: an object and a folder would have one name.",
                remedy="Use another key.",
                resource=self._key,
            ) from None
        except OSError as e:
            raise self._full() if e.errno in (errno.ENOSPC, errno.EDQUOT) else e from e

    def _full(self) -> QuotaExceeded:
        return QuotaExceeded(
            f"The bucket's disk is full: {self._key} cannot be written.",
            remedy="Free disk space of the bucket, or lower the retention of logs and uploads.",
            resource=self._key,
        )
