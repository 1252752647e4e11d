"""Google's STS and IAM Credentials API, as far as federation, impersonation and ``signBlob`` go. Tokens of ours are
really checked, against the JWKS that the test gives."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tests.lab.gce_filter import Refused


class NotExchanged(Exception):
    """Args: OAuth's code, and what Google says."""


class Auth:
    """One workload identity pool provider, and the service accounts that may be acted as.

    ``jwks``: None: nothing is checked, and calls need no token."""

    def __init__(self) -> None:
        self.jwks: dict[str, Any] | None = None
        self.issuer, self.audience, self.organization = "", "", ""
        self.accounts: dict[str, rsa.RSAPrivateKey] = {}
        """By e-mail: the key that Google keeps for it."""
        self.project = "acme-prod-1"
        self.lacking: set[str] = set()
        """Permissions that the accounts have not, wherever they are asked for."""
        self.lifetime_s = 3600
        self.calls: Counter[str] = Counter()
        self.valid: dict[str, float] = {}
        """Access tokens of service accounts, and when they end."""
        self._federated: set[str] = set()

    def add_account(self, email: str) -> None:
        self.accounts[email] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def check(self, request: Request) -> None:
        """Refuses a call without a good token."""
        if self.jwks is None:
            return
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.valid.get(token, 0) < time.time():
            raise Refused(401, "authError", "Request had invalid authentication credentials.")

    def exchange(self, token: str, audience: str) -> str:
        """Checks a token of ours: signature, issuer, audience, times, and the provider's condition."""
        self.calls["token"] += 1
        head, body, signature = token.split(".")
        header, claims = json.loads(_raw(head)), json.loads(_raw(body))
        key = next((k for k in (self.jwks or {})["keys"] if k["kid"] == header["kid"]), None)
        if key is None:
            raise ValueError("The kid of the token is in no JWKS.")
        numbers = rsa.RSAPublicNumbers(int.from_bytes(_raw(key["e"]), "big"), int.from_bytes(_raw(key["n"]), "big"))
        numbers.public_key().verify(_raw(signature), f"{head}.{body}".encode(), padding.PKCS1v15(), hashes.SHA256())
        if audience != self.audience:
            raise NotExchanged(
                "invalid_target",
                'The target service indicated by the "audience" parameters is invalid. This might either be because '
                "the pool or provider is disabled or deleted or because it doesn't exist.",
            )
        if claims["iss"] != self.issuer:
            raise ValueError(f"The issuer in ID Token {claims['iss']} does not match the expected ones: {self.issuer}.")
        if claims["aud"] != self.audience:
            raise ValueError(f"The audience in ID Token [{claims['aud']}] does not match the expected audience.")
        if not claims["nbf"] <= time.time() <= claims["exp"]:
            raise ValueError("ID Token is stale to sign-in.")
        if claims["org"] != self.organization:
            raise NotExchanged("unauthorized_client", "The given credential is rejected by the attribute condition.")
        made = f"federated-{uuid.uuid4()}"
        self._federated.add(made)
        return made

    def impersonate(self, request: Request, email: str) -> str:
        self.calls["generateAccessToken"] += 1
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if email not in self.accounts or token not in self._federated:
            raise Refused(
                403,
                "forbidden",
                "Permission 'iam.serviceAccounts.getAccessToken' denied on resource (or it may not exist).",
            )
        made = f"access-{uuid.uuid4()}"
        self.valid[made] = time.time() + self.lifetime_s
        return made

    def sign(self, request: Request, email: str, payload: bytes) -> bytes:
        self.calls["signBlob"] += 1
        self.check(request)
        if email not in self.accounts:
            raise Refused(403, "forbidden", "Permission 'iam.serviceAccounts.signBlob' denied on resource.")
        return self.accounts[email].sign(payload, padding.PKCS1v15(), hashes.SHA256())

    def public_pem(self, email: str) -> bytes:
        return (
            self.accounts[email]
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )


def routes(app: FastAPI, the: Callable[[], Auth]) -> None:
    @app.post("/v1/token")
    async def token(request: Request) -> Any:
        form = await _form(request)
        try:
            made = the().exchange(form["subject_token"], form["audience"])
        except NotExchanged as e:
            return JSONResponse({"error": e.args[0], "error_description": e.args[1]}, 400)
        except Exception as e:
            return JSONResponse({"error": "invalid_grant", "error_description": str(e) or type(e).__name__}, 400)
        kind = "urn:ietf:params:oauth:token-type:access_token"
        return {"access_token": made, "issued_token_type": kind, "token_type": "Bearer", "expires_in": 3600}

    @app.post("/v1/projects/-/serviceAccounts/{email}:generateAccessToken")
    async def generate(request: Request, email: str) -> Any:
        auth = the()
        made = auth.impersonate(request, email)
        ends = datetime.fromtimestamp(auth.valid[made], UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"accessToken": made, "expireTime": ends}

    @app.post("/v1/projects/-/serviceAccounts/{email}:signBlob")
    async def sign(request: Request, email: str) -> Any:
        payload = base64.b64decode((await request.json())["payload"])
        signed = the().sign(request, email, payload)
        return {"keyId": "1", "signedBlob": base64.b64encode(signed).decode()}

    @app.post("/v1/projects/{project}:testIamPermissions")
    async def test_project(request: Request, project: str) -> Any:
        auth = the()
        auth.check(request)
        if project != auth.project:
            raise Refused(403, "forbidden", "The caller does not have permission")
        return _held(auth, await request.json())

    @app.post("/v1/projects/-/serviceAccounts/{email}:testIamPermissions")
    async def test_account(request: Request, email: str) -> Any:
        auth = the()
        auth.check(request)
        if auth.accounts and email not in auth.accounts:
            raise Refused(404, "notFound", f"Unknown service account: {email}")
        return _held(auth, await request.json())


def _held(auth: Auth, asked: dict[str, Any]) -> dict[str, Any]:
    """As Google answers: no field at all for none."""
    if len(asked["permissions"]) > 100:
        raise Refused(400, "badRequest", "At most 100 permissions.")
    held = [p for p in asked["permissions"] if p not in auth.lacking]
    return {"permissions": held} if held else {}


async def _form(request: Request) -> dict[str, str]:
    from urllib.parse import parse_qsl

    return dict(parse_qsl((await request.body()).decode()))


def _raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
