"""The files of a local load balancer: what is written down, locks, and what the file system refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import structlog
from pydantic import ValidationError

from clouds.contract.balancer import Backend
from clouds.contract.errors import Denied, QuotaExceeded
from heliostat.errors import CloudError
from heliostat.models.common import Result

log = structlog.get_logger(__name__)

LOCK_S = 60.0
"""How long a call waits for others on the same service, each of which ends sooner."""


class CorruptFile(CloudError):
    """One of our own files cannot be understood."""


class EndpointRecord(Result):
    """``endpoint.json``: what stays the same for the endpoint's life, but for ``grpc``."""

    service_id: str
    service_name: str
    installation_id: str
    host: str
    port: int
    metrics_port: int
    url: str
    grpc: bool = False


class DesiredBackends(Result):
    """``backends.json``: the truth that the routes are made from."""

    revision: int = -1
    backends: list[Backend] = []


Stored = TypeVar("Stored", EndpointRecord, DesiredBackends)


def load(kind: type[Stored], path: Path) -> Stored:
    """Raises FileNotFoundError, and CorruptFile."""
    try:
        return kind.model_validate_json(path.read_text())
    except (ValidationError, UnicodeDecodeError):
        raise CorruptFile(
            f"{path} is corrupt.",
            remedy="Take endpoint.json from a backup, or remove the folder: the service gets another port.",
            resource=path.parent.name,
        ) from None


def endpoints(root: Path) -> Iterator[EndpointRecord]:
    """Of all endpoints that are there. One whose file cannot be read is logged and passed over: it is one service's
    trouble, and all others must not have it."""
    for path in sorted(root.glob("[!.]*/endpoint.json")):
        try:
            yield load(EndpointRecord, path)
        except FileNotFoundError:
            continue  # removed in between
        except (CorruptFile, OSError) as error:
            log.error("an endpoint is skipped", service=path.parent.name, why=str(error))


def read(path: Path) -> str:
    """ "" where there is none, and for what is no text."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def is_held(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file's lock, against other threads too. Raises FileNotFoundError if its folder is not there, or not any
    more when our turn comes."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CloudError(
                        f"{path} has been held by another process for {LOCK_S:.0f} s.",
                        remedy=f"Find that process (`fuser {path}`); the call is safe to repeat.",
                    ) from None
                time.sleep(0.005)
        if os.fstat(fd).st_ino != path.stat().st_ino:
            raise FileNotFoundError(errno.ENOENT, "it was replaced meanwhile", str(path))
        yield
    finally:
        os.close(fd)


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """What the file system refuses, in the words of ``clouds.contract``."""
    try:
        yield
    except OSError as e:
        kinds = {
            **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), QuotaExceeded),
            **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), Denied),
        }
        where = e.filename or folder
        raise kinds.get(e.errno or 0, CloudError)(
            f"The load balancer's files cannot be read or written: {where}: {e.strerror or e}.",
            remedy=f"Make {folder.parent} writable for this user, with space on its disk, and try again.",
            resource=folder.name,
        ) from e
