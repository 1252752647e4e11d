"""Our own OpenID issuer: what Google's workload identity federation trusts in place of a stored key.

The operator makes a workload identity pool with a provider whose issuer is our URL; Google's STS fetches the two
documents below from it over HTTPS (or holds an uploaded JWKS, for a control plane that it cannot reach), checks our
token and
maps its claims: ``google.subject=assertion.sub``, with the condition ``assertion.org == "<organization>"``, which plays
    the
part of AWS's external id. Signatures are google-auth's (``google.auth.crypt``, on ``cryptography``): RS256, which
is the one that every verifier takes
(https://cloud.google.com/iam/docs/workload-identity-federation-with-other-providers).
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth import crypt, jwt

from heliostat.errors import Unavailable

TOKEN_LIFETIME_S = 600
"""A token is exchanged within the second; Google takes up to 24 h."""
_EARLY_S = 30
"""For a clock of Google's that is behind ours."""
_KEY_BITS = 2048


class Issuer:
    """Signs tokens that say "this is organization X of this Heliostat".

    Args:
        url: ``https://…`` without a slash at its end; the tokens' ``iss``, below which ``discovery`` and ``jwks`` are
            served.
        pem: the private key (``new_key``).
        clock: seconds since the epoch.
    """

    def __init__(self, url: str, pem: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self.url = url.rstrip("/")
        self._clock = clock
        key = serialization.load_pem_private_key(pem, password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise ValueError("the issuer's key is no RSA key")
        numbers = key.public_key().public_numbers()
        self._jwk = {"kty": "RSA", "alg": "RS256", "use": "sig", "n": _number(numbers.n), "e": _number(numbers.e)}
        # RFC 7638 would hash the bare key; any name will do that changes with it.
        self._jwk["kid"] = hashlib.sha256(self._jwk["n"].encode()).hexdigest()[:16]
        self._signer = crypt.RSASigner.from_string(pem.decode(), key_id=self._jwk["kid"])

    def token(self, audience: str, subject: str, organization: str) -> str:
        """A JWT of ten minutes.

        Args:
            audience: the provider's, ``//iam.googleapis.com/projects/…/providers/…``.
            subject: who asks, e.g. ``heliostat:<installation>:cloud:<cloud id>``; at most 127 bytes go into
                ``google.subject``.
            organization: the claim ``org``, for the provider's condition.
        """
        now = int(self._clock())
        claims = {
            "iss": self.url,
            "aud": audience,
            "sub": subject,
            "org": organization,
            "iat": now - _EARLY_S,
            "nbf": now - _EARLY_S,
            "exp": now - _EARLY_S + TOKEN_LIFETIME_S,
        }
        return bytes(jwt.encode(self._signer, claims)).decode()

    def jwks(self) -> dict[str, Any]:
        """What ``<url>/.well-known/jwks.json`` answers."""
        return {"keys": [dict(self._jwk)]}

    def discovery(self) -> dict[str, Any]:
        """What ``<url>/.well-known/openid-configuration`` answers (OpenID Connect Discovery 1.0, §3)."""
        return {
            "issuer": self.url,
            "jwks_uri": f"{self.url}/.well-known/jwks.json",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["RS256"],
            "claims_supported": ["iss", "aud", "sub", "org", "iat", "nbf", "exp"],
        }


def new_key() -> bytes:
    """A private key, as unencrypted PEM (PKCS 8)."""
    return rsa.generate_private_key(public_exponent=65537, key_size=_KEY_BITS).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def load_or_create_key(path: Path) -> bytes:
    """The key in that file, mode 0600; made when missing, by one of several processes that start at once.

    Raises Unavailable for a file that others may read."""
    if not path.exists():
        fd, part = tempfile.mkstemp(dir=path.parent)  # 0600
        with os.fdopen(fd, "wb") as f:
            f.write(new_key())
            f.flush()
            os.fsync(f.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            pass  # another process was first: its key is ours
        finally:
            Path(part).unlink()
    if path.stat().st_mode & 0o077:
        raise Unavailable(f"{path} may be read by others.", remedy=f"chmod 600 {path}")
    return path.read_bytes()


def _number(value: int) -> str:
    """Base64url without padding, as JWKs have it (RFC 7518, §6.3.1)."""
    return base64.urlsafe_b64encode(value.to_bytes((value.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()
