"""The tree of all errors. The server raises a class, problem+json carries its ``code``, and the client raises the same
class again.

    HeliostatError
    ├── UserError                     exit 1   the request must change
    │   ├── InvalidRequest            400/422  a field is wrong; ``field`` names it
    │   ├── NotFound                  404
    │   ├── Conflict                  409      e.g. the same Idempotency-Key with another body, name taken
    │   ├── Gone                      410      it has ended for good; a node's agent stops its machine
    │   ├── TooLarge                  413
    │   └── NotHonoured               422      a known option that is not supported
    ├── AuthError                     exit 4
    │   ├── Unauthenticated           401      the token is missing, unknown, expired or revoked
    │   └── PermissionDenied          403
    ├── InfrastructureError           exit 2   Heliostat or the cloud failed; the request may be right
    │   ├── Unavailable               503      API, database, Temporal or bucket is unreachable: try again
    │   ├── ClusterFailed             409      the cluster could not start or was lost
    │   ├── CloudError                502      see clouds.contract for what each provider maps to it
    │   └── InternalError             500
    ├── WaitTimeout                   exit 3   only when the caller set a limit
    └── WorkloadFailed                exit 10  the user's program failed

Each error says what happened (``message``), to which resource (``resource``) and what to do next (``remedy``). Never
put a secret into any of them.
"""

from __future__ import annotations

from typing import Any, ClassVar


class HeliostatError(Exception):
    """Base of all errors of Heliostat.

    Args:
        message: what happened, one sentence that names the resource.
        remedy: what to do next, one sentence.
        resource: id or name of the affected resource.
        field: dotted path of the invalid field (invalid input only).
        details: more data for programs, as JSON.
    """

    code: ClassVar[str] = "heliostat_error"
    status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        resource: str | None = None,
        field: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.resource = resource
        self.field = field
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def to_problem(self) -> dict[str, Any]:
        """RFC 9457 problem+json body: ``type title status code detail remedy resource field details``."""
        problem: dict[str, Any] = {
            "type": f"urn:heliostat:error:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "code": self.code,
            "detail": self.message,
            "remedy": self.remedy,
        }
        for key in ("resource", "field"):
            if getattr(self, key) is not None:
                problem[key] = getattr(self, key)
        if self.details:
            problem["details"] = self.details
        return problem


class UserError(HeliostatError):
    code, status, exit_code = "user_error", 400, 1


class InvalidRequest(UserError):
    code, status = "invalid_request", 422


class NotFound(UserError):
    code, status = "not_found", 404


class Conflict(UserError):
    code, status = "conflict", 409


class Gone(UserError):
    code, status = "gone", 410


class TooLarge(UserError):
    code, status = "too_large", 413


class NotHonoured(UserError):
    code, status = "not_honoured", 422


class AuthError(HeliostatError):
    code, status, exit_code = "auth_error", 401, 4


class Unauthenticated(AuthError):
    code, status = "unauthenticated", 401


class PermissionDenied(AuthError):
    code, status = "permission_denied", 403


class InfrastructureError(HeliostatError):
    code, status, exit_code = "infrastructure_error", 500, 2


class Unavailable(InfrastructureError):
    code, status = "unavailable", 503


class ClusterFailed(InfrastructureError):
    code, status = "cluster_failed", 409


class CloudError(InfrastructureError):
    code, status = "cloud_error", 502


class InternalError(InfrastructureError):
    code, status = "internal_error", 500


class WaitTimeout(HeliostatError):
    code, status, exit_code = "wait_timeout", 504, 3


class WorkloadFailed(HeliostatError):
    code, status, exit_code = "workload_failed", 409, 10


def _tree(cls: type[HeliostatError]) -> dict[str, type[HeliostatError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


BY_CODE: dict[str, type[HeliostatError]] = _tree(HeliostatError)


def from_problem(problem: dict[str, Any]) -> HeliostatError:
    """Rebuilds the class that the other side raised. An unknown code (a newer server) becomes the nearest class by HTTP
    status."""
    cls = BY_CODE.get(str(problem.get("code")))
    if cls is None:
        status = int(problem.get("status") or 500)
        cls = UserError if 400 <= status < 500 else InternalError
    return cls(
        str(problem.get("detail") or problem.get("title") or "unknown error"),
        remedy=str(problem.get("remedy") or ""),
        resource=problem.get("resource"),
        field=problem.get("field"),
        details=problem.get("details"),
    )
