"""URLs that carry the right to one object for a while, and the keys that objects may have."""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from clouds.contract.object_keys import KEY_MAX, checked
from heliostat.errors import PermissionDenied


@dataclass(frozen=True)
class Grant:
    """What a signed URL allows: these bytes, or any where None."""

    size: int | None
    sha256: str | None


class SignedUrls:
    """Makes and checks ``<url>/objects/<key>?expires=…&signature=…``: HMAC-SHA256 over method, key, expiry and,
    for a PUT, the size and sha256 of what may come. A GET's signature is good for HEAD too."""

    def __init__(self, url: str, key: bytes) -> None:
        self._url, self._key = url.rstrip("/"), key

    def presign_get(self, key: str, expires_in_s: int) -> str:
        return self._presign("GET", key, expires_in_s, "", "")

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        return self._presign("PUT", key, expires_in_s, "" if size is None else str(size), sha256 or "")

    def put_headers(self, *, sha256: str | None = None) -> dict[str, str]:
        return {}

    def verify(self, method: str, key: str, query: Mapping[str, str]) -> Grant:
        """What the query string of a signed URL allows. Raises PermissionDenied."""
        expires, size, sha256 = query.get("expires", ""), query.get("size", ""), query.get("sha256", "")
        expected = self._signature("GET" if method == "HEAD" else method, key, expires, size, sha256)
        if not hmac.compare_digest(expected.encode(), query.get("signature", "").encode()):
            raise PermissionDenied(
                f"The URL's signature does not allow to {method} object {key[:KEY_MAX]}.",
                remedy="Ask for a new URL.",
                resource=key[:KEY_MAX],
            )
        if time.time() > int(expires):
            raise PermissionDenied(f"The URL of object {key} has expired.", remedy="Ask for a new URL.", resource=key)
        return Grant(int(size) if size else None, sha256 or None)

    def _presign(self, method: str, key: str, expires_in_s: int, size: str, sha256: str) -> str:
        checked(key)
        query = {"expires": str(int(time.time()) + expires_in_s)}
        query |= {name: value for name, value in (("size", size), ("sha256", sha256)) if value}
        query["signature"] = self._signature(method, key, query["expires"], size, sha256)
        return f"{self._url}/objects/{quote(key)}?{urlencode(query)}"

    def _signature(self, method: str, key: str, expires: str, size: str, sha256: str) -> str:
        text = json.dumps([method, key, expires, size, sha256])
        return hmac.new(self._key, text.encode(), hashlib.sha256).hexdigest()
