"""Every key of this installation, derived from one secret by label: knowing one tells nothing of another."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from heliostat.errors import InternalError, InvalidRequest

SECRET_BYTES = 32


class Keys:
    """``secret`` encrypts all new values; ``older`` ones still decrypt what was encrypted with them (rotation)."""

    def __init__(self, secret: bytes, older: tuple[bytes, ...] = ()) -> None:
        if len(secret) != SECRET_BYTES:
            raise InvalidRequest(
                f"The secret key has {len(secret)} bytes instead of {SECRET_BYTES}.",
                remedy="Set HELIOSTAT_SECRET_KEY to the base64 of 32 random bytes.",
                field="HELIOSTAT_SECRET_KEY",
            )
        self._secret = secret
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(_derive(s, "seal"))) for s in (secret, *older)])

    def __repr__(self) -> str:
        return "Keys(…)"

    def bootstrap_token(self, node_id: str, generation: int) -> str:
        """64 hex digits; good for ``register`` of this node and generation only."""
        return _derive(self._secret, f"bootstrap/{node_id}/{generation}").hex()

    def ray_token(self, cluster_id: str) -> str:
        """Ray's authentication token of one cluster, 64 hex digits."""
        return _derive(self._secret, f"ray/{cluster_id}").hex()

    def bucket_key(self) -> bytes:
        """Signs URLs of the local cloud's bucket."""
        return _derive(self._secret, "bucket")

    def installation_id(self) -> str:
        """Marks what this installation makes in a cloud; no secret, and not the same for two installations."""
        return f"hs-{_derive(self._secret, 'installation').hex()[:16]}"

    def external_id(self, organization_id: str) -> str:
        """What a customer's AWS role must ask for (``sts:ExternalId``). No secret; made by us and another one for each
        organization, so that none can have us assume another's role."""
        return f"heliostat-{_derive(self._secret, f'external-id/{organization_id}').hex()[:24]}"

    def digest(self, data: bytes) -> str:
        """64 hex digits that tell nothing of ``data`` to whom has the records but not the secret."""
        return hmac.new(_derive(self._secret, "digest"), data, hashlib.sha256).hexdigest()

    def seal(self, value: dict[str, Any]) -> bytes:
        return self._fernet.encrypt(json.dumps(value, ensure_ascii=False).encode())

    def open(self, ciphertext: bytes) -> dict[str, Any]:
        """Raises InternalError when it was encrypted with a secret that we do not have."""
        try:
            value: dict[str, Any] = json.loads(self._fernet.decrypt(ciphertext))
        except InvalidToken:
            raise InternalError(
                "An encrypted value can't be decrypted: it was encrypted with another secret key.",
                remedy="Restore the secret.key that belongs to these records.",
            ) from None
        return value


def _derive(secret: bytes, label: str) -> bytes:
    return hmac.new(secret, f"heliostat/{label}".encode(), hashlib.sha256).digest()


def load_or_create(home: Path, env_value: str = "") -> Keys:
    """The keys of this installation: from ``env_value`` (base64 of 32 bytes), else from ``<home>/secret.key``,
    made with mode 0600 at first start. Several processes may start at once: all get the same."""
    if env_value:
        try:
            return Keys(base64.b64decode(env_value, validate=True))
        except binascii.Error:
            raise InvalidRequest(
                "HELIOSTAT_SECRET_KEY is not base64.",
                remedy="Set it to the base64 of 32 random bytes.",
                field="HELIOSTAT_SECRET_KEY",
            ) from None
    path = home / "secret.key"
    if not path.exists():
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = home / f".secret.key.{os.getpid()}.{secrets.token_hex(4)}"
        draft.touch(mode=0o600)
        draft.write_text(base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode() + "\n")
        try:
            os.link(draft, path)  # whole or not at all, and only the first one wins
        except FileExistsError:
            pass  # another process was first: its key is ours
        finally:
            draft.unlink()
    try:
        return Keys(base64.b64decode(path.read_text(), validate=False))
    except binascii.Error:
        raise InvalidRequest(
            f"{path} is not base64.", remedy="Restore it from a backup: nothing else decrypts what it encrypted."
        ) from None
