"""What the commands of services share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from heliostat.errors import InvalidRequest

if TYPE_CHECKING:
    from heliostat.models.services import Service, ServiceDeploy

Ref = Annotated[str, typer.Argument(metavar="NAME|ID")]
CommandWait = Annotated[
    bool,
    typer.Option("-w", "--wait", help="Wait until it is done; exit 10 if it can no longer succeed. No time limit."),
]


def check_limit(wait: bool, timeout_s: float | None) -> None:
    if timeout_s is not None and not wait:
        raise InvalidRequest(
            "--timeout-s needs --wait.", remedy="Add --wait, or remove --timeout-s.", field="timeout_s"
        )


def accepted(service: Service, request: ServiceDeploy) -> str:
    from heliostat.client.resources.rollouts import Target

    target = Target.of(service, request)
    if target.version_id is None:
        return f"Service {service.name} ({service.id}): {target.in_words} is accepted."
    name = next(v.name for v in service.versions if v.id == target.version_id)
    under_way = service.rollout.version_id if service.rollout is not None else None
    other = next((v.name for v in service.versions if v.id == under_way and v.id != target.version_id), None)
    return f"Service {service.name} ({service.id}): version {name} is accepted." + (
        f" It replaces the rollout to {other}." if other else ""
    )
