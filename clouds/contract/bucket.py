"""What a cloud's bucket must do; ``tests/clouds/contract/test_bucket.py`` runs it against every provider."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Protocol

from heliostat.models.common import Result


class StoredObject(Result):
    key: str
    size: int
    modified_at: datetime


class Bucket(Protocol):
    """Objects of one cloud: code and logs. Keys are ``/``-separated, written whole (a reader never sees half
    of an object), last write wins."""

    def put(self, key: str, data: bytes) -> None: ...

    def get(self, key: str) -> bytes:
        """Raises Gone."""
        ...

    def stat(self, key: str) -> StoredObject | None: ...

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        """All objects under ``prefix`` in key order."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Already gone is done."""
        ...

    def presign_get(self, key: str, expires_in_s: int) -> str:
        """URL that anyone may GET (with Range) until it expires."""
        ...

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        """URL that anyone may PUT one object to until it expires. With ``size``/``sha256`` the bucket refuses
        other bytes (HTTP 400); a full disk is 507."""
        ...

    def put_headers(self, *, sha256: str | None = None) -> dict[str, str]:
        """What a PUT to the URL of ``presign_put`` must carry beside its length, for the same ``sha256``."""
        ...
