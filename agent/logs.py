"""Ships log files to the bucket in chunks, from second 0, through presigned URLs.

A stream is a file that only grows. Its bytes stay on this disk until they are in the bucket, so nothing is lost while
the control plane is unavailable. A chunk is PUT again, whole, as it grows, up to 1 MiB; then the next one starts.
"""

from __future__ import annotations

import http.client
import logging
import re
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.channel import Backoff, Channel, Gone, Http, Refused, Unavailable
from agent.constants import Constants

log = logging.getLogger("agent.logs")
SESSION_LOGS = ("raylet.out", "raylet.err", "gcs_server.out", "gcs_server.err", "monitor.log", "monitor.out",
                "monitor.err", "dashboard.log", "dashboard_agent.log", "ray_process_exit.log")  # fmt: skip
"""Not ``runtime_env_agent.log``: Ray writes users' env values into it."""
SIGN_MAX = 64
NAME = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){0,3}")
"""Names that the API signs; one invalid name would block all streams of the same request."""


@dataclass
class Stream:
    name: str
    path: Path
    limit: int | None = None
    """Bytes beyond this are not shipped."""
    shipped: int = 0
    """Bytes of the file that are in the bucket."""
    chunk: int = 0
    """Start of the chunk that grows now."""
    rotations: int = 0

    def size(self) -> int:
        try:
            size = self.path.stat().st_size
        except OSError:
            return 0
        if size < self.shipped:  # rotated or truncated: another stream follows
            self.rotations += 1
            self.shipped = self.chunk = 0
        return size if self.limit is None else min(size, self.limit)

    def pending(self) -> int:
        return self.size() - self.shipped

    @property
    def label(self) -> str:
        return f"{self.name}.{self.rotations}" if self.rotations else self.name


class LogShipper:
    def __init__(self, channel: Channel, constants: Constants) -> None:
        self._channel = channel
        self._constants = constants
        self._streams: dict[str, Stream] = {}
        self._lock = threading.Lock()
        self._shipping = threading.Lock()
        self._wake = threading.Event()
        self._buckets: dict[str, Http] = {}
        self._session: Callable[[], Path | None] = lambda: None
        self._worker_files = 0
        self.follow = False
        """Somebody follows the logs: ship every second."""

    def add(self, name: str, path: Path, limit: int | None = None) -> None:
        with self._lock:
            self._streams.setdefault(name, Stream(name, path, limit))

    def watch_session(self, logs_dir: Callable[[], Path | None]) -> None:
        """Finds Ray's own log files there as they appear."""
        self._session = logs_dir

    def set_follow(self, follow: bool) -> None:
        if follow and not self.follow:
            self._wake.set()
        self.follow = follow

    def pending(self) -> int:
        with self._lock:
            streams = list(self._streams.values())
        return sum(s.pending() for s in streams)

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``. Raises nothing: an unavailable bucket is tried again."""
        backoff = Backoff(self._constants.log_follow_s, self._constants.backoff_cap_s)
        while not stop.is_set():
            try:
                self._discover()
                self.ship()
            except (Unavailable, Refused, Gone, OSError) as error:
                wait = backoff.next()
                log.warning("shipping logs failed, next attempt in %.1f s: %s", wait, error)
                stop.wait(wait)
                continue
            backoff.reset()
            self._wake.wait(self._constants.log_follow_s if self.follow else self._constants.log_interval_s)
            self._wake.clear()

    def wake(self) -> None:
        self._wake.set()

    def flush(self, timeout_s: float, name: str | None = None) -> bool:
        """Ships everything (of one stream) that is in the file now; False if the bucket does not accept it in time."""
        deadline = time.monotonic() + timeout_s
        backoff = Backoff(0.1, 1.0)
        while True:
            try:
                if name is None:
                    self._discover()
                self.ship(name, deadline)
            except (Unavailable, Refused, OSError) as error:
                left = deadline - time.monotonic()
                if left <= 0.05:
                    log.error("%s is not complete in the bucket: %s", name or "the log", error)
                    return False
                time.sleep(min(backoff.next(), left))
            except Gone:
                return False
            else:
                return True

    def ship(self, name: str | None = None, deadline: float | None = None) -> None:
        """Ships all new bytes, or those of one stream. Raises Unavailable, Refused, Gone, OSError."""
        while self._ship_once(name, deadline):
            pass

    def _ship_once(self, name: str | None, deadline: float | None) -> bool:
        """One chunk of each stream; False when there was nothing to ship. It releases the lock afterwards, so that the
        end of a run does not wait for megabytes of other logs."""
        left = 30.0 if deadline is None else deadline - time.monotonic()
        if left <= 0 or not self._shipping.acquire(timeout=left):
            raise Unavailable("out of time")
        try:
            with self._lock:
                chosen = [s for s in self._streams.values() if name is None or s.name == name]
            due = [s for s in chosen if s.pending() > 0][:SIGN_MAX]
            if not due:
                return False
            items = [{"stream": s.label, "offset": s.chunk} for s in due]
            urls = self._channel.call("POST", "/logs/sign", {"items": items}, timeout_s=min(10.0, left))["urls"]
            for stream, url in zip(due, urls, strict=True):
                self._put(stream, url, left)
            return True
        finally:
            self._shipping.release()

    def _put(self, stream: Stream, url: str, timeout_s: float) -> None:
        with stream.path.open("rb") as source:
            source.seek(stream.chunk)
            most = self._constants.log_chunk_bytes
            if stream.limit is not None:
                most = min(most, stream.limit - stream.chunk)
            data = source.read(most)
        parts = urllib.parse.urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        bucket = self._buckets.setdefault(origin, Http(origin))
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            status, _ = bucket.request("PUT", target, data, {}, timeout_s)
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(f"the bucket at {parts.netloc}: {error!r}") from None
        if status >= 300:
            raise Unavailable(f"the bucket at {parts.netloc} answered HTTP {status} to {stream.label}")
        stream.shipped = stream.chunk + len(data)
        if len(data) >= self._constants.log_chunk_bytes:
            stream.chunk = stream.shipped

    def _discover(self) -> None:
        folder = self._session()
        if folder is None or not folder.is_dir():
            return
        serve = folder / "serve"
        for path in [*folder.iterdir(), *(serve.glob("*.log") if serve.is_dir() else [])]:
            stream = f"ray/{path.relative_to(folder)}"
            if stream in self._streams or not NAME.fullmatch(stream):
                continue
            if path.name in SESSION_LOGS:
                self.add(stream, path, self._constants.stream_max_bytes)
            elif (
                (path.parent == serve or (path.name.startswith("worker-") and path.suffix in (".out", ".err")))
                and self._worker_files < self._constants.worker_streams_max
                and path.stat().st_size > 0
            ):
                self._worker_files += 1
                self.add(stream, path, self._constants.stream_max_bytes)
