"""The errors that a cloud may raise. Each provider maps its vendor's errors to these in one table."""

from __future__ import annotations

from heliostat.errors import CloudError


class NoCapacity(CloudError):
    """The cloud has no such machine now: try another zone, type or market, or wait."""

    code = "no_capacity"


class NotOffered(NoCapacity):
    """This zone never has that instance type: another zone or type may, and waiting does not help."""

    code = "not_offered"
    status = 422


class QuotaExceeded(CloudError):
    """The account's limit is reached: wait or raise it."""

    code = "quota_exceeded"


class Throttled(CloudError):
    """Too many calls: the same call again, later."""

    code = "throttled"
    status = 503


class BadConfig(CloudError):
    """The cloud refuses this request for good: only another request helps."""

    code = "bad_config"
    status = 422

    @classmethod
    def same_token(cls, machine_id: str, node_id: str) -> BadConfig:
        return cls(
            f"Machine {machine_id} was launched under the same token with another request.",
            remedy="Use a new generation of the node for another request.",
            resource=node_id,
        )


class Denied(CloudError):
    """A permission of the control plane is missing: the operator must grant it."""

    code = "denied"


class Gone(CloudError):
    """The resource no longer exists. Deletes treat this as done and never raise it."""

    code = "gone"
    status = 404


class Outdated(CloudError):
    """The resource has a newer revision than the one given, or other content under the same one: nothing was changed.
    ``details["revision"]`` is the current one; only a greater one changes it."""

    code = "outdated"
    status = 409

    @classmethod
    def backends(cls, service_id: str, given: int, has: int) -> Outdated:
        return cls(
            f"The load balancer of service {service_id} has backends of revision {has} and rejects those of revision "
            f"{given}, which are {'different' if given == has else 'older'}.",
            remedy=f"Set the backends under a revision above {has}.",
            resource=service_id,
            details={"revision": has},
        )


class BackendsLost(CloudError):
    """The endpoint no longer knows which backends it should have: call ``set_backends`` again, under any revision. What
    runs keeps its routes."""

    code = "backends_lost"
