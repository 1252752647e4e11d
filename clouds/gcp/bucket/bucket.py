"""Objects of one bucket of Cloud Storage, by its JSON API over google-auth's session.

google-cloud-storage is not used: it would sign at a fixed host, and of its retries, resumable uploads and batches
nothing is needed here.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any
from urllib.parse import quote

from clouds.contract.bucket import StoredObject
from clouds.contract.errors import BadConfig, Gone, Throttled
from clouds.contract.object_keys import checked
from clouds.gcp.account.errors import InUse
from clouds.gcp.account.session import Session
from clouds.gcp.bucket.signing import Signer
from heliostat.errors import CloudError, InvalidRequest
from heliostat.models.clouds import GcpConfig

TRIES = 3
"""Of a call that Google says may be tried again: whoever reads a log has no activity that would do it."""
BACK_OFF_S = 0.2
UPLOAD_S = 300.0
"""For an object to be written or read whole; what is large goes by signed URLs."""
DELETES_AT_ONCE = 16


class GcpBucket:
    """Objects under ``GcpConfig.bucket_prefix`` (``clouds.contract.bucket.Bucket``). Google writes an object
    whole and shows it at
    once, in reads and in lists (https://cloud.google.com/storage/docs/consistency).

    What differs, since Google cannot be told more in a URL:

    - ``presign_put`` with ``size`` signs the ``Content-Length``: another length, or none, is refused with 403, not 400.
    - ``sha256`` cannot be enforced: Google knows CRC32C and MD5 alone, and wants either in a header of the client's.
    Whoever
      reads must check it.
    - A bucket has no end: no 507.

    Args:
        config: names the bucket.
        session: of its project.
        prefix: after the config's, e.g. of an organization; ends in ``/`` unless it is empty.
    """

    def __init__(self, config: GcpConfig, session: Session, prefix: str = "") -> None:
        self._session, self._bucket = session, config.bucket
        self._prefix = config.bucket_prefix + prefix
        self._signer = Signer(session)
        self._objects = f"{session.endpoints.storage}/storage/v1/b/{self._bucket}/o"
        self._uploads = f"{session.endpoints.storage}/upload/storage/v1/b/{self._bucket}/o"

    def put(self, key: str, data: bytes) -> None:
        """Raises BadConfig when there is no such bucket."""
        query = {"uploadType": "media", "name": self._name(key)}
        headers = {"content-type": "application/octet-stream"}
        answer = self._ask(
            "POST", self._uploads, "write", key, params=query, data=data, headers=headers, timeout=UPLOAD_S
        )
        if answer is None:
            raise self._no_bucket()

    def get(self, key: str) -> bytes:
        answer = self._ask("GET", self._url(key), "read", key, params={"alt": "media"}, timeout=UPLOAD_S)
        if answer is None:
            raise Gone(
                f"Object {key} does not exist.",
                remedy="It may have been deleted by the retention policy.",
                resource=key,
            )
        return bytes(answer.content)

    def stat(self, key: str) -> StoredObject | None:
        answer = self._ask("GET", self._url(key), "look at", key)
        return None if answer is None else self._stored(answer.json())

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        query = {"prefix": self._prefix + prefix, "startOffset": self._prefix + start_after if start_after else ""}
        found: list[StoredObject] = []
        while True:
            answer = self._ask("GET", self._objects, "list", prefix, params=query)
            if answer is None:
                raise self._no_bucket()
            page = answer.json()
            found += (self._stored(item) for item in page.get("items", []))
            if "nextPageToken" not in page:
                # startOffset itself is in the list.
                return [o for o in found if o.key > start_after]
            query["pageToken"] = page["nextPageToken"]

    def delete(self, keys: Iterable[str]) -> None:
        """Google has no delete of several in one call but an old batch of parts, each counted: one each, side by
        side."""
        urls = {key: self._url(key) for key in keys}
        if urls:
            with ThreadPoolExecutor(min(DELETES_AT_ONCE, len(urls))) as pool:
                answers = [pool.submit(self._ask, "DELETE", url, "delete", key) for key, url in urls.items()]
            for answer in answers:
                answer.result()

    def presign_get(self, key: str, expires_in_s: int) -> str:
        """Good for HEAD too."""
        return self._signer.url("GET", self._bucket, self._name(key), expires_in_s)

    def presign_put(self, key: str, expires_in_s: int, *, size: int | None = None, sha256: str | None = None) -> str:
        if sha256 is not None and len(sha256) != 64:
            raise InvalidRequest(f"{sha256[:80]!r} is not a valid sha256.", field="sha256")
        headers = {} if size is None else {"content-length": str(size)}
        return self._signer.url("PUT", self._bucket, self._name(key), expires_in_s, headers)

    def put_headers(self, *, sha256: str | None = None) -> dict[str, str]:
        return {}

    # -- inside

    def _ask(self, method: str, url: str, doing: str, key: str, **options: Any) -> Any | None:
        """The answer; None for 404. Every call here is repeatable."""
        for tried in range(1, TRIES + 1):
            try:
                answer = self._session.http(method, url, f"{doing} {key} in bucket {self._bucket}", key, **options)
            except CloudError as e:
                if tried == TRIES or not (type(e) is CloudError or isinstance(e, (Throttled, InUse))):
                    raise
                time.sleep(BACK_OFF_S * 2**tried)
                continue
            if answer.status_code != 404:
                return answer
            if "bucket does not exist" in answer.text:
                raise self._no_bucket()
            return None
        raise AssertionError("unreachable")

    def _no_bucket(self) -> BadConfig:
        return BadConfig(
            f"Bucket {self._bucket} does not exist, or is not this project's.",
            remedy="Make it, or correct the cloud's config.",
            resource=self._bucket,
        )

    def _name(self, key: str) -> str:
        checked(key)
        return self._prefix + key

    def _url(self, key: str) -> str:
        return f"{self._objects}/{quote(self._name(key), safe='')}"

    def _stored(self, item: dict[str, Any]) -> StoredObject:
        return StoredObject(
            key=item["name"].removeprefix(self._prefix),
            size=int(item["size"]),
            modified_at=datetime.fromisoformat(item["updated"]),
        )
