"""One call to the API as a flow: bearer token, one Idempotency-Key for all tries of a create, retries, and
problem+json turned back into the class that the server raised.

It retries a connection that failed, timed out or was cut, and 429, 502, 503 and 504. That is safe for a create, for its
key stays the same: the server answers a retry with the resource of the first try. All other calls of this API are
idempotent.
"""

from __future__ import annotations

import email.utils
import math
import random
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import pydantic
from pydantic import BaseModel, TypeAdapter

from heliostat.client.config import Target
from heliostat.client.effects import Flow, Send, Sleep
from heliostat.errors import (
    HeliostatError,
    InfrastructureError,
    InternalError,
    NotFound,
    PermissionDenied,
    TooLarge,
    Unauthenticated,
    Unavailable,
    UserError,
    from_problem,
)

T = TypeVar("T")

TIMEOUT = httpx.Timeout(60.0, connect=5.0)
"""The API answers at once; a minute covers a slow network. For an upload it applies to each block."""
TRIES = 6
FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
MAX_RETRY_AFTER_S = 60.0
"""The longest Retry-After that a call waits for; a longer one is raised to the caller."""
RETRIED_STATUS = frozenset({429, 502, 503, 504})
PATIENT = math.inf
"""For ``tries``: a wait or a followed log survives any outage; only its own limit ends it."""

# A proxy is never right for this machine: HTTP_PROXY must not catch the calls to the embedded stack.
NO_PROXY: dict[str, None] = {"all://127.0.0.1": None, "all://localhost": None, "all://[::1]": None}

OnRetry = Callable[[HeliostatError, float], None]


class Api:
    """The API's address and token, and the flows of single calls.

    Args:
        on_retry: called before each retry, with the error and the seconds until the retry.
    """

    def __init__(self, target: Target, on_retry: OnRetry | None = None) -> None:
        self.target = target
        self.on_retry = on_retry

    def call(
        self,
        method: str,
        path: str,
        answer: type[T],
        *,
        params: Mapping[str, Any] | None = None,
        body: BaseModel | None = None,
        key: str | None = None,
        tries: float = TRIES,
    ) -> Flow[T]:
        """One exchange with ``/v1<path>``. Raises the server's error, or Unavailable when there is no answer."""
        if not self.target.token:
            raise Unauthenticated(
                f"There is no token for {self.target.host}.",
                remedy="Run `heliostat login`, or set HELIOSTAT_TOKEN.",
            )
        headers = {"Authorization": f"Bearer {self.target.token}", "Accept": "application/json"}
        content = None
        if body is not None:
            # Without defaults: the server, perhaps a newer one, fills the fields that the user left out.
            content = body.model_dump_json(exclude_unset=True).encode()
            headers["Content-Type"] = "application/json"
        if method == "POST" or key is not None:
            headers["Idempotency-Key"] = key or str(uuid.uuid4())
        url = f"{self.target.host}/v1{path}{_query(params)}"
        response = yield from self._send(Send(method, url, headers, content), tries)
        return _parse(answer, response)

    def fetch(self, url: str, headers: dict[str, str], *, tries: float = TRIES) -> Flow[httpx.Response]:
        """GET from a presigned URL, without our token. The caller checks the status."""
        return (yield from self._send(Send("GET", url, headers), tries, what="the bucket", check_status=False))

    def put(self, send: Send) -> Flow[httpx.Response]:
        """PUT to a presigned URL, in the same way."""
        return (yield from self._send(send, TRIES, what="the bucket", check_status=False))

    def _send(self, send: Send, tries: float, what: str = "", check_status: bool = True) -> Flow[httpx.Response]:
        tried = 0
        while True:
            tried += 1
            wait = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** min(tried - 1, 10)) * random.uniform(0.8, 1.2)
            try:
                response: httpx.Response = yield send
            except httpx.InvalidURL as error:
                raise UserError(
                    f"{self.target.host!r} is not a usable address: {error}.", remedy="Write it as http://host:port."
                ) from error
            except httpx.TransportError as error:
                problem: HeliostatError = self._unreachable(send, error, what)
                if tried >= tries:
                    raise problem from error
            else:
                if response.is_success or (not check_status and response.status_code not in RETRIED_STATUS):
                    return response
                if send.method == "DELETE" and tried > 1 and response.status_code == 404:
                    return response  # the try whose answer was lost deleted it
                problem = _problem(response)
                retry_after = _retry_after(response)
                too_long = (retry_after or 0) > MAX_RETRY_AFTER_S and tries != PATIENT
                if response.status_code not in RETRIED_STATUS or tried >= tries or too_long:
                    raise problem
                wait = max(wait, min(retry_after or 0, MAX_RETRY_AFTER_S))
            if self.on_retry:
                self.on_retry(problem, wait)
            yield Sleep(wait)

    def _unreachable(self, send: Send, error: httpx.TransportError, what: str) -> Unavailable:
        url = httpx.URL(send.url)
        where = f"{url.scheme}://{url.netloc.decode()}"
        how = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "can't be reached"
        cause = str(error) or type(error).__name__
        if what:
            return Unavailable(f"{what.capitalize()} at {where} {how} ({cause}).", remedy="Try again.", resource=where)
        return Unavailable(
            f"The Heliostat API at {where} ({self.target.host_from}) {how}: {cause}.",
            remedy="Check that it is running. `make up` starts the embedded stack; "
            "HELIOSTAT_HOST or `heliostat login` select another server.",
            resource=where,
        )


def path_of(*parts: str) -> str:
    """A URL path of these parts, each quoted: names and ids come from people."""
    return "".join("/" + quote(part, safe="") for part in parts)


def _query(params: Mapping[str, Any] | None) -> str:
    items: list[tuple[str, str | int | float | bool | None]] = []
    for name, value in (params or {}).items():
        if value is None:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        items += [(name, str(v).lower() if isinstance(v, bool) else str(v)) for v in values]
    return f"?{httpx.QueryParams(items)}" if items else ""


def _parse(answer: type[T], response: httpx.Response) -> T:
    if answer is type(None):
        return None
    try:
        return TypeAdapter(answer).validate_json(response.content)
    except pydantic.ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise InternalError(
            f"The client can't read the answer of {response.request.method} {response.request.url.path} "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}).",
            remedy="The server may be newer. Compare both with `heliostat version`, then update the client.",
        ) from error


def _problem(response: httpx.Response) -> HeliostatError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if isinstance(problem, dict) and "code" in problem:
        return from_problem(problem)
    # Not our answer: a proxy's, or another server's.
    status = response.status_code
    text = " ".join(response.text.split())[:200]
    where = str(response.request.url.copy_with(query=None))
    said = f"{response.request.method} {where} answered {status} {response.reason_phrase}" + (
        f": {text}" if text else ""
    )
    remedy = "Check that the host is a Heliostat API and that no proxy is in between."
    classes: dict[int, type[HeliostatError]] = {
        401: Unauthenticated,
        403: PermissionDenied,
        404: NotFound,
        413: TooLarge,
        **dict.fromkeys(RETRIED_STATUS, Unavailable),
    }
    fallback = UserError if 400 <= status < 500 else InfrastructureError
    return classes.get(status, fallback)(said + ".", remedy=remedy)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds or an HTTP date (RFC 9110 §10.2.3); None when absent or invalid."""
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
