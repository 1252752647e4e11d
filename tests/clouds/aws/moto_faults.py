"""What goes wrong between a client and moto: refusals, delays and lost answers, by action and argument."""

from __future__ import annotations

import io
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.clouds.aws import presigned

StartResponse = Callable[..., Any]


@dataclass
class Fault:
    action: str
    """API name, e.g. ``RunInstances``."""
    code: str = "InternalError"
    status: int = 400
    message: str = "injected"
    match: dict[str, str] = field(default_factory=dict)
    """Arguments that the call must have, by their names on the wire, e.g. ``{"InstanceType": "g5.xlarge"}``."""
    times: float = 1
    delay_s: float = 0
    lost: bool = False
    """The call is carried out, then its connection breaks."""
    answer: str = ""
    """Given instead of an error, e.g. an empty list."""


class Faulty:
    """In front of moto's own application. ``faults`` and ``calls`` are shared with the test.

    ``POST /_fault`` with a fault's fields as JSON adds one, ``DELETE /_fault`` heals all: for tests in other processes.
    """

    def __init__(self, app: Any, faults: list[Fault], calls: list[dict[str, str]]) -> None:
        self._app, self._faults, self._calls = app, faults, calls
        self._lock = threading.Lock()

    def __call__(self, env: dict[str, Any], start: StartResponse) -> Iterable[bytes]:
        if env["PATH_INFO"] == "/_fault":
            return self._told(env, start)
        form = env["REQUEST_METHOD"] == "POST" and "x-www-form-urlencoded" in env.get("CONTENT_TYPE", "")
        if "X-Amz-Signature=" in env.get("QUERY_STRING", ""):
            refused = presigned.refusal(env)
            if refused:
                status, code = refused
                start(f"{status} X", [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()]
        if not form:
            return self._app(env, start)
        body = env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0))
        env["wsgi.input"] = io.BytesIO(body)
        given = dict(urllib.parse.parse_qsl(body.decode()))
        with self._lock:
            self._calls.append(given)
            fault = next((f for f in self._faults if f.times >= 1 and _hits(f, given)), None)
            if fault is not None:
                fault.times -= 1
        if fault is None:
            return self._app(env, start)
        time.sleep(fault.delay_s)
        if fault.lost:
            list(self._app(env, lambda *a, **k: None))
            env["werkzeug.socket"].shutdown(2)
            raise ConnectionError("the answer is lost")
        found = re.search(r"/([a-z0-9-]+)/aws4_request", env.get("HTTP_AUTHORIZATION", ""))
        error = f"<Error><Type>Sender</Type><Code>{fault.code}</Code><Message>{fault.message}</Message></Error>"
        of_ec2 = found is not None and found[1] == "ec2"
        text = f"<Response><Errors>{error}</Errors></Response>" if of_ec2 else f"<ErrorResponse>{error}</ErrorResponse>"
        if fault.answer:
            start("200 OK", [("Content-Type", "text/xml")])
            return [fault.answer.encode()]
        start(f"{fault.status} X", [("Content-Type", "text/xml")])
        return [text.encode()]

    def _told(self, env: dict[str, Any], start: StartResponse) -> list[bytes]:
        with self._lock:
            if env["REQUEST_METHOD"] == "DELETE":
                self._faults.clear()
            else:
                body = env["wsgi.input"].read(int(env.get("CONTENT_LENGTH") or 0))
                self._faults.append(Fault(**json.loads(body)))
        start("204 No Content", [])
        return []


def _hits(fault: Fault, given: dict[str, str]) -> bool:
    return fault.action == given.get("Action") and all(given.get(k) == v for k, v in fault.match.items())
