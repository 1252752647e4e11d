"""What S3 checks of a presigned URL and moto does not, by the documented steps of Signature Version 4
(https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, quote

from moto.sts.models import sts_backends


def refusal(env: dict[str, Any]) -> tuple[int, str] | None:
    """Status and code with which S3 refuses this request of WSGI's; None: it takes it."""
    path, _, query = env["RAW_URI"].partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    signature, names = given.pop("X-Amz-Signature"), given["X-Amz-SignedHeaders"].split(";")
    made = datetime.strptime(given["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    if datetime.now(UTC) > made + timedelta(seconds=int(given["X-Amz-Expires"])):
        return 403, "AccessDenied"
    headers = {k[5:].replace("_", "-").lower(): v for k, v in env.items() if k.startswith("HTTP_")}
    headers["content-length"] = env.get("CONTENT_LENGTH", "")
    if any(name.startswith("x-amz-") and name not in names for name in headers):
        return 403, "AccessDenied"
    canonical = "\n".join(
        [
            env["REQUEST_METHOD"],
            path,
            "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(given.items())),
            *(f"{name}:{headers.get(name, '').strip()}" for name in names),
            "",
            ";".join(names),
            "UNSIGNED-PAYLOAD",
        ]
    )
    access_key, *scope = given["X-Amz-Credential"].split("/")
    role = next((r for r in _assumed() if r.access_key_id == access_key), None)
    if role is None or role.session_token != given.get("X-Amz-Security-Token"):
        return 403, "InvalidAccessKeyId"
    key = b"AWS4" + role.secret_access_key.encode()
    for part in scope:
        key = hmac.new(key, part.encode(), "sha256").digest()
    text = "\n".join(
        ["AWS4-HMAC-SHA256", given["X-Amz-Date"], "/".join(scope), hashlib.sha256(canonical.encode()).hexdigest()]
    )
    if not hmac.compare_digest(hmac.new(key, text.encode(), "sha256").hexdigest(), signature):
        return 403, "SignatureDoesNotMatch"
    announced = headers.get("x-amz-checksum-sha256")
    if announced is not None:
        body = env["wsgi.input"].read(int(headers["content-length"]))
        env["wsgi.input"] = io.BytesIO(body)
        if base64.b64encode(hashlib.sha256(body).digest()).decode() != announced:
            return 400, "BadDigest"
    return None


def _assumed() -> list[Any]:
    return [role for account in list(sts_backends.values()) for role in account["aws"].assumed_roles]
