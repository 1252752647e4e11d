"""Signed URLs of Cloud Storage, without a private key: Google signs for the service account that we act as.

The form is V4 (https://cloud.google.com/storage/docs/authentication/canonical-requests); the signature is
``serviceAccounts.signBlob`` of the IAM Credentials API, which wants ``iam.serviceAccounts.signBlob`` of the account on
itself (role Service Account Token Creator). Each URL is one call of it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit

from clouds.gcp.account.session import Session
from heliostat.models.common import utcnow

MAX_EXPIRES_S = 7 * 24 * 3600
"""Google's limit."""


class Signer:
    """Args:
    session: whose service account signs.
    clock: now; Google refuses what is dated more than 15 minutes ahead.
    """

    def __init__(self, session: Session, *, clock: Callable[[], datetime] = utcnow) -> None:
        self._session, self._clock = session, clock
        self._base = session.endpoints.storage

    def url(
        self, method: str, bucket: str, name: str, expires_in_s: int, headers: Mapping[str, str] | None = None
    ) -> str:
        """Args:
            headers: by small name; whoever uses the URL must send exactly these.

        Raises Denied when the account may not sign."""
        seconds = min(max(expires_in_s, 1), MAX_EXPIRES_S)
        at = self._clock().astimezone(UTC) + timedelta(seconds=min(expires_in_s, 1) - 1)
        stamp, account = at.strftime("%Y%m%dT%H%M%SZ"), self._session.service_account
        scope = f"{stamp[:8]}/auto/storage/goog4_request"
        signed = dict(sorted({"host": urlsplit(self._base).netloc, **(headers or {})}.items()))
        query = {
            "X-Goog-Algorithm": "GOOG4-RSA-SHA256",
            "X-Goog-Credential": f"{account}/{scope}",
            "X-Goog-Date": stamp,
            "X-Goog-Expires": str(seconds),
            "X-Goog-SignedHeaders": ";".join(signed),
        }
        encoded = "&".join(f"{key}={quote(value, safe='-_.~')}" for key, value in sorted(query.items()))
        path = f"/{bucket}/{quote(name, safe='/~')}"
        lines = [f"{key}:{value}" for key, value in signed.items()]
        canonical = "\n".join([method, path, encoded, *lines, "", query["X-Goog-SignedHeaders"], "UNSIGNED-PAYLOAD"])
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        signature = self._sign(f"GOOG4-RSA-SHA256\n{stamp}\n{scope}\n{digest}".encode())
        return f"{self._base}{path}?{encoded}&X-Goog-Signature={signature.hex()}"

    def _sign(self, text: bytes) -> bytes:
        account = self._session.service_account
        answer = self._session.http(
            "POST",
            f"{self._session.endpoints.iam}/v1/projects/-/serviceAccounts/{account}:signBlob",
            "sign a URL",
            account,
            json={"payload": base64.b64encode(text).decode()},
        )
        return base64.b64decode(answer.json()["signedBlob"])
