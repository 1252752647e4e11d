"""Answers that the gate gives itself, in the shape of the API's errors (RFC 9457)."""

from __future__ import annotations

import json
from dataclasses import dataclass

from .policy import Verdict


@dataclass(frozen=True)
class Problem:
    status: int
    code: str
    detail: str
    remedy: str
    headers: tuple[tuple[bytes, bytes], ...] = ()

    def body(self) -> bytes:
        return json.dumps({
            "type": f"urn:heliostat:error:{self.code}", "title": self.code.replace("_", " ").capitalize(),
            "status": self.status, "code": self.code, "detail": self.detail, "remedy": self.remedy,
        }).encode()  # fmt: skip

    def start(self) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Body and headers."""
        body = self.body()
        length = (b"content-length", b"%d" % len(body))
        return body, [(b"content-type", b"application/problem+json"), length, *self.headers]


ABSENT = Problem(
    401, "unauthenticated", "This service requires a token and the request has none.",
    "Send 'Authorization: Bearer <token>'; `heliostat service status` shows the service's token.",
    ((b"www-authenticate", b"Bearer"),),
)  # fmt: skip
WRONG = Problem(
    403, "permission_denied", "The token is not valid for this service, or is no longer valid.",
    "Send one valid token in one 'Authorization: Bearer <token>' header; `heliostat service status` shows it.",
)  # fmt: skip
NOT_THE_AGENT = Problem(
    403, "permission_denied", "Only the node's agent may read the gate's statistics.",
    "Use `heliostat service status`; it shows them.",
)  # fmt: skip
ONLY_GET = Problem(
    405, "invalid_request", "The gate's statistics support GET only.", "Send GET.", ((b"allow", b"GET"),)
)
BROKEN = Problem(
    500, "internal_error", "The application ended the request without an answer.",
    "See the version's logs for the reason: `heliostat service logs`.",
)  # fmt: skip
REFUSALS = {Verdict.ABSENT: ABSENT, Verdict.WRONG: WRONG, Verdict.NOT_THE_AGENT: NOT_THE_AGENT}


def closed(reason: str) -> Problem:
    return Problem(
        503, "unavailable", f"The gate of this head has no valid policy: {reason}.",
        "Try again: the node's agent writes the file again. If the error persists, see node/agent.log of the head.",
        ((b"retry-after", b"1"),),
    )  # fmt: skip
