"""When a wait for a service is over: it has what the caller waits for, or it can no longer get there. Pure: a polled
service in, the answer out."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from heliostat.errors import WorkloadFailed
from heliostat.models.services import (
    RolloutAction,
    Service,
    ServiceDeploy,
    ServiceState,
    ServiceVersion,
    ServiceVersionState,
)

UNDER_WAY = (ServiceVersionState.STARTING, ServiceVersionState.UPDATING)
ENDED = (ServiceVersionState.TERMINATING, ServiceVersionState.TERMINATED)


def reached(service: Service, wanted: ServiceState) -> bool:
    """Raises WorkloadFailed when the service can no longer reach this state by itself."""
    if service.state == wanted:
        return True
    gone = service.state in (ServiceState.TERMINATING, ServiceState.TERMINATED)
    # A service that had traffic recovers by itself; one whose first version failed needs another deploy.
    stuck = wanted is ServiceState.RUNNING and service.state is ServiceState.UNHEALTHY and not _may_recover(service)
    if (gone and wanted not in (ServiceState.TERMINATING, ServiceState.TERMINATED)) or stuck:
        raise WorkloadFailed(
            f"Service {service.name} ({service.id}) is {service.state}" + _because(service.reason),
            remedy=_see_events(service),
            resource=service.id,
            details={"state": service.state},
        )
    return service.state is ServiceState.TERMINATED and wanted is ServiceState.TERMINATING


def _may_recover(service: Service) -> bool:
    return service.rollout is not None or any(v.weight > 0 or v.state in UNDER_WAY for v in service.versions)


@dataclass
class Target:
    """The goal of one deploy. It is stateful: give it each polled service in turn.

    Args:
        version_id: of the deployed version; None: the deploy changes weights only.
        canary_percent: the percentage at which the rollout pauses.
        weights: percent by version name, static.
        paused_beyond: a pause at a larger percentage than this completes it too.
        ends_with_rollout: its rollout has begun: it is complete when the rollout is over and the version runs.
    """

    version_id: str | None
    canary_percent: int | None = None
    weights: dict[str, int] = field(default_factory=dict)
    paused_beyond: int | None = None
    ends_with_rollout: bool = False
    _agreed: bool = False
    """The service has had exactly these target weights."""
    _kept: dict[str, datetime] = field(default_factory=dict)
    """Versions that this deploy uses although they had failed before, and since when."""

    @classmethod
    def of(cls, service: Service, deploy: ServiceDeploy | None = None) -> Target:
        """``service``: the answer of the deploy; its version has the requested name, or is the newest."""
        if deploy is not None and deploy.versions:
            unhealthy = ServiceVersionState.UNHEALTHY
            return cls(
                None,
                weights={v.name: v.traffic_percent for v in deploy.versions},
                _kept={v.name: v.state_since for v in service.versions if v.state is unhealthy},
            )
        name = deploy.config.version_name if deploy is not None and deploy.config is not None else None
        named = [v for v in service.versions if name is None or v.name == name]
        version = max(named, key=lambda v: v.number, default=None)
        if version is None:
            raise WorkloadFailed(
                f"Service {service.name} ({service.id}) has no version of this deploy.",
                remedy=_see_events(service),
                resource=service.id,
            )
        percent = deploy.canary_percent if deploy is not None else None
        return cls(version.id, canary_percent=None if percent == 100 else percent)

    @property
    def in_words(self) -> str:
        if self.weights:
            return ", ".join(f"{name} at {percent} %" for name, percent in self.weights.items())
        share = f"{self.canary_percent} % (paused)" if self.canary_percent is not None else "100 %"
        return f"the new version at {share}"

    def reached(self, service: Service) -> bool:
        """Raises WorkloadFailed when it can no longer be: unhealthy, rolled back, replaced, terminated."""
        return self._weights_apply(service) if self.weights else self._version_serves(service)

    def _version_serves(self, service: Service) -> bool:
        version = next((v for v in service.versions if v.id == self.version_id), None)
        if version is None:
            raise self._failed(service, None)
        rollout = service.rollout
        primary = service.primary_version == version.id
        if primary and rollout is not None and rollout.version_id != version.id:
            return True  # it was complete, and the next deploy has begun
        if primary and version.weight == 100 and service.state is ServiceState.RUNNING:
            return True
        if rollout is not None and rollout.version_id == version.id and rollout.state == "paused":
            beyond = self.paused_beyond is not None and rollout.percent > self.paused_beyond
            if beyond or rollout.percent == self.canary_percent:
                return True
        running = version.state is ServiceVersionState.RUNNING and service.state is ServiceState.RUNNING
        if self.ends_with_rollout and rollout is None and running:
            return True  # of static weights
        if version.state in ENDED:
            raise self._failed(service, version)
        if version.state is ServiceVersionState.UNHEALTHY and not _may_still_recover(service, version):
            raise self._failed(service, version)
        return False

    def _weights_apply(self, service: Service) -> bool:
        by_name: dict[str, ServiceVersion] = {}
        for version in sorted(service.versions, key=lambda v: v.number):
            by_name[version.name] = version
        for name, percent in self.weights.items():
            failed = by_name.get(name)
            if percent == 0 or failed is None:
                continue
            unhealthy = failed.state is ServiceVersionState.UNHEALTHY and not _may_still_recover(service, failed)
            unhealthy = unhealthy and failed.state_since != self._kept.get(name)
            if failed.state in ENDED or unhealthy:
                raise self._failed(service, failed)
        goes_to = {v.name: v.target_weight for v in by_name.values() if v.target_weight}
        has = {v.name: v.weight for v in by_name.values() if v.weight}
        wanted = {name: percent for name, percent in self.weights.items() if percent}
        if has == wanted and service.state is ServiceState.RUNNING:
            return True
        if goes_to == wanted:
            self._agreed = True
        elif self._agreed:
            raise WorkloadFailed(
                f"Service {service.name} ({service.id}) no longer goes to {self.in_words}: "
                "another deploy replaced these weights" + _because(service.reason),
                remedy=_see_events(service),
                resource=service.id,
                details={"state": service.state},
            )
        return False

    def _failed(self, service: Service, version: ServiceVersion | None) -> WorkloadFailed:
        number = version.number if version else 0
        newer = [v for v in service.versions if v.number > number and v.id != self.version_id]
        name = f"Version {version.name} ({version.id})" if version else f"Version {self.version_id}"
        what = f"{name} of service {service.name} "
        if version is not None and version.state is ServiceVersionState.UNHEALTHY:
            what += "is unhealthy" + _because(version.reason or service.reason)
            if version.kept_until is not None and version.clusters:
                what += " It stays for inspection for a while."
        elif service.state in (ServiceState.TERMINATING, ServiceState.TERMINATED):
            what += f"has ended: the service is {service.state}" + _because(service.reason)
        elif newer:
            by = max(newer, key=lambda v: v.number)
            what += f"was replaced by the deploy of {by.name} ({by.id})"
            what += _because(version.reason if version else "")
        else:
            what += "was rolled back" + _because(version.reason if version else service.reason)
        logs = f" --version {version.name}" if version else ""
        return WorkloadFailed(
            what,
            remedy=f"`heliostat service logs {service.name}{logs}` shows what it printed, "
            f"`heliostat service events {service.name}` what happened.",
            resource=service.id,
            details={"state": service.state, "version": self.version_id, "version_state": version and version.state},
        )


class Back:
    """The goal of a rollback or an abort. The records may be old for a moment, so it compares with the service
    ``before`` the command: the new version is abandoned and the primary one has the traffic; without a rollout, the
    previous version becomes the primary one. It is stateful, like Target."""

    def __init__(self, before: Service) -> None:
        self._before = before
        newest_first = sorted(before.versions, key=lambda v: -v.number)
        under_way = before.rollout.version_id if before.rollout is not None else None
        self._under_way = under_way or next((v.id for v in newest_first if v.state in UNDER_WAY), None)
        self._leaving = self._under_way or before.primary_version
        self._goal = before.primary_version if self._under_way else before.previous_version
        self._started = False
        """The returning version has started."""

    @property
    def in_words(self) -> str:
        name = next((v.name for v in self._before.versions if v.id == self._goal), "the previous version")
        return f"{name} at 100 %"

    def reached(self, service: Service) -> bool:
        """Raises WorkloadFailed when it can no longer be: the previous version is unhealthy, another deploy replaced
        it, the service is terminated."""
        if service.state in (ServiceState.TERMINATING, ServiceState.TERMINATED):
            return reached(service, ServiceState.RUNNING)
        left = next((v for v in service.versions if v.id == self._leaving), None)
        returning = next((v for v in service.versions if v.id == self._goal), None)
        rollout = service.rollout
        if not self._under_way and returning is not None:
            self._started |= returning.state in (*UNDER_WAY, ServiceVersionState.RUNNING) or (
                rollout is not None and rollout.version_id == returning.id
            )
        going = rollout is not None and rollout.version_id == self._leaving
        if going or service.state is ServiceState.ROLLING_BACK or (left is not None and left.state in UNDER_WAY):
            return False
        primary = service.primary_version
        if primary == self._goal or (self._goal is None and primary != self._leaving):
            return service.state is ServiceState.RUNNING or rollout is not None
        if primary not in (self._leaving, self._before.primary_version):
            raise self._failed(service, returning)
        if returning is not None and self._failed_to_return(returning):
            raise self._failed(service, returning)
        return False  # the records are old, or it is on its way

    def _failed(self, service: Service, returning: ServiceVersion | None) -> WorkloadFailed:
        known = max((v.number for v in self._before.versions), default=0)
        newer = max((v for v in service.versions if v.number > known), key=lambda v: v.number, default=None)
        what = f"The rollback of service {service.name} ({service.id}) "
        if newer is not None:
            what += f"was replaced by the deploy of {newer.name} ({newer.id})."
        else:
            name = f"{returning.name} ({returning.id})" if returning is not None else "the previous version"
            what += f"did not succeed: {name} does not serve" + _because(returning.reason if returning else "")
        return WorkloadFailed(
            what,
            remedy=_see_events(service),
            resource=service.id,
            details={"state": service.state, "version": self._goal, "version_state": returning and returning.state},
        )

    def _failed_to_return(self, returning: ServiceVersion) -> bool:
        was = next((v for v in self._before.versions if v.id == returning.id), None)
        changed = was is not None and returning.state_since != was.state_since
        if returning.state is ServiceVersionState.UNHEALTHY:
            return changed or self._started
        # It may have been draining before the command: that it has ended since proves nothing.
        ended_again = changed and was is not None and was.state is ServiceVersionState.TERMINATED
        return not self._under_way and returning.state in ENDED and (self._started or ended_again)


def commanded(before: Service, action: RolloutAction | None, percent: int | None = None) -> Target | Back:
    """The goal of an accepted command. ``before``: the service before it; ``action``: None is a rollback; ``percent``:
    as with promote."""
    if action in (None, RolloutAction.ABORT):
        return Back(before)
    rollout = before.rollout
    if rollout is None:  # it has just begun
        newest = max(before.versions, key=lambda v: v.number, default=None)
        target = Target(newest.id if newest is not None else None)
    else:
        target = Target(rollout.version_id, ends_with_rollout=True)
    if action is RolloutAction.RESUME:
        target.paused_beyond = rollout.percent if rollout is not None else 0
    elif percent != 100:
        target.canary_percent = percent
    return target


def _may_still_recover(service: Service, version: ServiceVersion) -> bool:
    """Unhealthy, but not failed: it has traffic and recovers, or the traffic is still on its way back."""
    if service.state is ServiceState.ROLLING_BACK:
        return True
    return version.weight > 0 and version.kept_until is None


def _because(reason: str) -> str:
    return f": {reason.rstrip('.')}." if reason else "."


def _see_events(service: Service) -> str:
    return f"`heliostat service events {service.name}` shows what happened."
