"""Maps errors of Google Cloud to those of ``clouds.contract``: one table for HTTP answers and failed operations.

HTTP answers have a status and ``errors[].reason`` (https://cloud.google.com/compute/docs/troubleshooting/common-errors
and https://cloud.google.com/apis/design/errors); an operation that is DONE has ``error.errors[].code``. What is out of
stock comes the second way alone. The codes come from Google's pages and from what SkyPilot handles.
"""

from __future__ import annotations

import json
import re
from typing import Any

import requests
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError, OAuthError, RefreshError

from clouds.contract.errors import BadConfig, Denied, Gone, NoCapacity, QuotaExceeded, Throttled
from heliostat.errors import CloudError


class Exists(CloudError):
    """Something has that name already. Never leaves this package."""


class Changed(CloudError):
    """The resource has changed since it was read (412). Leaves this package only as an error to retry."""


class InUse(CloudError):
    """Something else still needs the thing, or it is being changed: try again."""


CODES: dict[str, type[CloudError]] = {
    # codes of operations
    "ZONE_RESOURCE_POOL_EXHAUSTED": NoCapacity,
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS": NoCapacity,
    "REGION_RESOURCE_POOL_EXHAUSTED": NoCapacity,
    "RESOURCE_POOL_EXHAUSTED": NoCapacity,
    "VM_MIN_COUNT_NOT_REACHED": NoCapacity,
    "IP_SPACE_EXHAUSTED": NoCapacity,  # of the subnetwork: like a full zone, another place may have room
    "IP_SPACE_EXHAUSTED_WITH_DETAILS": NoCapacity,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "RESOURCE_OPERATION_RATE_EXCEEDED": Throttled,
    "RATE_LIMIT_EXCEEDED": Throttled,
    "PERMISSION_DENIED": Denied,
    "PERMISSIONS_ERROR": Denied,
    "RESOURCE_NOT_FOUND": Gone,
    "RESOURCE_ALREADY_EXISTS": Exists,
    "RESOURCE_IN_USE_BY_ANOTHER_RESOURCE": InUse,
    "RESOURCE_NOT_READY": InUse,
    "IP_IN_USE_BY_ANOTHER_RESOURCE": InUse,
    "CONDITION_NOT_MET": Changed,
    "UNSUPPORTED_OPERATION": BadConfig,
    "INVALID_FIELD_VALUE": BadConfig,
    "INVALID_USAGE": BadConfig,
    # reasons of HTTP answers
    "rateLimitExceeded": Throttled,
    "userRateLimitExceeded": Throttled,
    "quotaExceeded": QuotaExceeded,
    "limitExceeded": QuotaExceeded,
    "forbidden": Denied,
    "insufficientPermissions": Denied,
    "accessNotConfigured": Denied,
    "authError": Denied,
    "notFound": Gone,
    "alreadyExists": Exists,
    "resourceInUseByAnotherResource": InUse,
    "resourceNotReady": InUse,
    "conditionNotMet": Changed,
    "invalid": BadConfig,
    "badRequest": BadConfig,
    "required": BadConfig,
    "backendError": CloudError,
    "internalError": CloudError,
}

STATUSES: dict[int, type[CloudError]] = {
    400: BadConfig,
    401: Denied,
    403: Denied,
    404: Gone,
    409: InUse,
    410: Gone,
    412: Changed,
    422: BadConfig,
    429: Throttled,
}
"""Where the code says nothing. Anything else may be tried again."""

REMEDIES: dict[type[CloudError], str] = {
    NoCapacity: "Try another zone, type or market, or wait.",
    QuotaExceeded: "Wait until other resources are gone, or raise the project's quota (console: IAM & Admin, Quotas).",
    Throttled: "Try again later.",
    BadConfig: "Change the cloud's or the compute config.",
    Gone: "It no longer exists.",
    Denied: "Grant it to the cloud's service account.",
}

_PERMISSION = re.compile(
    r"Required '(?P<a>[\w.]+)' permission|Permission '(?P<b>[\w.]+)' denied|does not have (?P<c>[\w.]+\.[\w.]+) access"
    r"|does not have permission '?(?P<d>[\w.]+\.[\w.]+)"
)
_POLICY = re.compile(r"\b(?:constraints|customConstraints)/[\w.]+")
"""An organization's policy refuses by the error of an outdated fingerprint (412, CONDITION_NOT_MET)."""
_API = re.compile(r"\b(\w+\.googleapis\.com)\b")


def classify(code: str, status: int) -> type[CloudError]:
    """The class of an error by its code, else by its HTTP status."""
    return CODES.get(code) or STATUSES.get(status) or CloudError


def error(code: str, status: int, text: str, doing: str, resource: str | None = None) -> CloudError:
    """One of ours, with what Google said and what to do about it."""
    cls = classify(code, status)
    remedy = REMEDIES.get(cls, "Try again: the call is repeatable.")
    details: dict[str, Any] = {"code": code or str(status)}
    policy = _POLICY.search(text) if cls is Changed else None
    if policy is not None:
        cls = BadConfig
        remedy = f"The organization policy {policy[0]} forbids it: ask for an exception, or change the cloud's config."
    if cls is Denied:
        missing = permission(text)
        api = _API.search(text)
        if code == "accessNotConfigured" and api is not None:
            remedy = f"Enable the API: gcloud services enable {api[1]}"
        elif missing:
            remedy = f"Grant the permission {missing} to the cloud's service account."
            details["permission"] = missing
    return cls(f"Google Cloud refused to {doing}: {text}", remedy=remedy, resource=resource, details=details)


def permission(text: str) -> str:
    """The missing permission's name, "" if the text names none."""
    found = _PERMISSION.search(text)
    return next((name for name in found.groups() if name), "") if found is not None else ""


def raised(e: Exception, doing: str, resource: str | None = None) -> CloudError:
    """What google-api-core, google-auth or requests has raised, as one of ours."""
    if isinstance(e, GoogleAPICallError):
        reasons = [item.get("reason", "") for item in e.errors if isinstance(item, dict)]
        return error(next(iter(reasons), ""), int(e.code or 0), str(e.message), doing, resource)
    if isinstance(e, (OAuthError, RefreshError)):
        return _not_trusted(e, doing)
    if isinstance(e, (GoogleAuthError, requests.RequestException)):
        return CloudError(
            f"Google Cloud did not answer when asked to {doing}: {type(e).__name__}: {e}",
            remedy="Try again: the call is repeatable. Check the network if it goes on.",
            resource=resource,
        )
    raise TypeError(f"{type(e)} is not an error of Google's libraries")


def answered(response: requests.Response, doing: str, resource: str | None = None) -> CloudError:
    """An HTTP answer of 400 and above of Cloud Storage's JSON API or of IAM, as one of ours."""
    try:
        body_json = response.json()["error"]
        code = next((e["reason"] for e in body_json.get("errors", [])), str(body_json.get("status", "")))
        text = str(body_json["message"])
    except (ValueError, KeyError, TypeError):
        code, text = "", response.text[:500] or response.reason
    return error(code, response.status_code, text, doing, resource)


def operation_error(operation: Any, doing: str, resource: str | None = None) -> CloudError | None:
    """Why an operation (``compute_v1.Operation``) has failed; None if it has not."""
    failures = list(operation.error.errors) if operation.error else []
    if not failures and operation.http_error_status_code < 400:
        return None
    code, text = (failures[0].code, failures[0].message) if failures else ("", operation.http_error_message)
    return error(code, operation.http_error_status_code, text or code, doing, resource)


def _not_trusted(e: OAuthError | RefreshError, doing: str) -> CloudError:
    """STS did not take our token, or IAM does not let it act as the service account. The body is Google's; it holds no
    token."""
    body = next((str(arg) for arg in e.args[1:] if isinstance(arg, str)), "") or str(e)
    if e.retryable or "backendError" in body or "UNAVAILABLE" in body:
        return CloudError(f"Google's token service failed when asked to {doing}.", remedy="Try again.")
    text = body
    try:
        body_json = json.loads(body)
        held = body_json.get("error")
        text = held["message"] if isinstance(held, dict) else f"{held}: {body_json.get('error_description', '')}"
    except (ValueError, KeyError, AttributeError):
        pass  # not JSON: as it is
    missing = permission(text) or ("iam.serviceAccounts.getAccessToken" if "getAccessToken" in text else "")
    if missing:
        remedy = f"Grant {missing} (role Workload Identity User) on the service account to the pool's principals."
    else:
        remedy = "Compare the workload identity provider's issuer, audience and condition with the cloud's config."
    details = {"permission": missing} if missing else {}
    return Denied(f"Google Cloud does not trust us; not done: {doing}: {text[:500]}", remedy=remedy, details=details)
