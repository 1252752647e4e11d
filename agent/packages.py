"""Code of runs: downloaded once by the head, checked, and served to all nodes of the cluster.

The URL that Ray sees is stable, ``http://<head>:<port>/packages/<sha256>.zip``, because Ray caches by URL; a
presigned one changes with every run and expires while a worker joins. Ray (2.60) unpacks a zip with one top-level
directory without that directory. The client's zips have ``pkg/`` as theirs, so a ``working_dir`` becomes what was below
it, and a ``py_module`` ``pkg/<module>/…`` becomes a directory on PYTHONPATH with ``<module>`` in it.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from agent.boot import Boot

log = logging.getLogger("agent.packages")
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK = 2**20


class PackageFailed(Exception):
    """A package is unavailable. ``retryable``: the bucket does not answer or the disk is full; later it may work."""

    def __init__(self, message: str, retryable: bool) -> None:
        self.retryable = retryable
        super().__init__(message)


class Packages:
    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._folder = boot.node_dir / "packages"
        self._folder.mkdir(exist_ok=True)
        self._base = f"http://{boot.ip}:{boot.ports.agent}/packages"
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self.downloading = 0
        """The number of downloads under way."""

    def uri(self, source: dict[str, Any]) -> str:
        """The URI for Ray of ``{url, sha256}`` or ``{remote}``. Raises PackageFailed."""
        if source.get("remote"):
            return str(source["remote"])
        sha256 = str(source.get("sha256") or "")
        if not SHA256.fullmatch(sha256) or not source.get("url"):
            raise PackageFailed("a package needs url and sha256, or remote", retryable=False)
        with self._guard:
            lock = self._locks.setdefault(sha256, threading.Lock())
        with lock:
            if not self.path(sha256).exists():
                with self._guard:
                    self.downloading += 1
                try:
                    self._fetch(str(source["url"]), sha256)
                finally:
                    with self._guard:
                        self.downloading -= 1
        return f"{self._base}/{sha256}.zip"

    def local(self, uri: str) -> Path | None:
        """The file of a ``uri`` of this head's own; None for other URIs."""
        name = uri.removeprefix(f"{self._base}/").removesuffix(".zip")
        return self.path(name) if uri.startswith(self._base) and SHA256.fullmatch(name) else None

    def path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.zip"

    def _fetch(self, url: str, sha256: str) -> None:
        """Streams to the disk. The URL is presigned, so no message contains it."""
        part = self.path(sha256).with_suffix(".part")
        where = urllib.parse.urlsplit(url).netloc
        digest, size = hashlib.sha256(), 0
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise PackageFailed(f"package {sha256[:12]} has a URL that is neither http nor https", retryable=False)
        try:
            with _opener(url).open(url, timeout=self._boot.constants.package_timeout_s) as source:
                announced = int(source.headers.get("Content-Length") or 0)
                self._check_space(max(announced, 1), sha256)
                with part.open("wb") as target:
                    while block := source.read(BLOCK):
                        size += len(block)
                        if size > self._boot.constants.package_max_bytes:
                            raise PackageFailed(f"package {sha256[:12]} is larger than the node allows", False)
                        digest.update(block)
                        target.write(block)
            if announced and size != announced:
                raise PackageFailed(f"package {sha256[:12]} from {where} broke off after {size} bytes", True)
        except urllib.error.HTTPError as error:
            # 403: the URL has expired; the repeated command has a fresh one
            raise PackageFailed(f"package {sha256[:12]}: {where} answered HTTP {error.code}", True) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise PackageFailed(f"package {sha256[:12]} can't be downloaded from {where}: {reason}", True) from None
        else:
            if digest.hexdigest() != sha256:
                raise PackageFailed(
                    f"the content of the package from {where} does not have the hash {sha256[:12]}", retryable=False
                )
            part.rename(self.path(sha256))
            log.info("package %s: %d bytes from %s", sha256[:12], size, where)
        finally:
            part.unlink(missing_ok=True)

    def _check_space(self, size: int, sha256: str) -> None:
        free = shutil.disk_usage(self._folder).free
        if free < size:
            raise PackageFailed(f"disk full: package {sha256[:12]} has {size} bytes, {free} are free on the head", True)


def _opener(url: str) -> urllib.request.OpenerDirector:
    """With the machine's proxy, if it has one, except to the local cloud's bucket on this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost" or host.startswith("127."):
        return urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener()
