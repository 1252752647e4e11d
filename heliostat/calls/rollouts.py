"""When a service is where somebody waits for it to be, and when it can't get there any more. Pure: one look at the
service in, the answer out."""

from __future__ import annotations

from dataclasses import dataclass, field

from heliostat.errors import WorkloadFailed
from heliostat.models.services import Service, ServiceDeploy, ServiceState, ServiceVersion, ServiceVersionState

ENDED = (ServiceVersionState.TERMINATING, ServiceVersionState.TERMINATED)


def reached(service: Service, wanted: ServiceState) -> bool:
    """Raises WorkloadFailed when the service can't come into this state by itself any more."""
    if service.state == wanted:
        return True
    gone = service.state in (ServiceState.TERMINATING, ServiceState.TERMINATED)
    # A service that had traffic is healed by itself; one whose first version failed waits for another deploy.
    stuck = wanted is ServiceState.RUNNING and service.state is ServiceState.UNHEALTHY and not _may_recover(service)
    if (gone and wanted not in (ServiceState.TERMINATING, ServiceState.TERMINATED)) or stuck:
        raise WorkloadFailed(
            f"Service {service.name} ({service.id}) is {service.state}" + _because(service.reason),
            remedy=_look(service),
            resource=service.id,
            details={"state": service.state},
        )
    return service.state is ServiceState.TERMINATED and wanted is ServiceState.TERMINATING


def _may_recover(service: Service) -> bool:
    return service.rollout is not None or any(
        v.weight > 0 or v.state in (ServiceVersionState.STARTING, ServiceVersionState.UPDATING)
        for v in service.versions
    )


@dataclass
class Target:
    """What one deploy is to come to. Remembers what it has seen: ask it about one look after the other.

    Args:
        version_id: of the deployed version; None: only weights were changed.
        canary_percent: the share at which the rollout is to stop.
        weights: percent by version name, static.
    """

    version_id: str | None
    canary_percent: int | None = None
    weights: dict[str, int] = field(default_factory=dict)
    _agreed: bool = False
    """The service was seen to go to exactly these weights."""

    @classmethod
    def of(cls, service: Service, deploy: ServiceDeploy | None = None) -> Target:
        """``service``: as the deploy was answered; its version has the name that was asked for, or is the newest."""
        if deploy is not None and deploy.versions:
            return cls(None, weights={v.name: v.traffic_percent for v in deploy.versions})
        name = deploy.config.version_name if deploy is not None and deploy.config is not None else None
        named = [v for v in service.versions if name is None or v.name == name]
        version = max(named, key=lambda v: v.number, default=None)
        if version is None:
            raise WorkloadFailed(
                f"Service {service.name} ({service.id}) does not tell which version this deploy is.",
                remedy=_look(service),
                resource=service.id,
            )
        percent = deploy.canary_percent if deploy is not None else None
        return cls(version.id, canary_percent=None if percent == 100 else percent)

    @property
    def in_words(self) -> str:
        if self.weights:
            return ", ".join(f"{name} at {percent} %" for name, percent in self.weights.items())
        share = f"{self.canary_percent} % (a pause there)" if self.canary_percent is not None else "100 %"
        return f"the new version at {share}"

    def reached(self, service: Service) -> bool:
        """Raises WorkloadFailed when it never will be: unhealthy, rolled back, superseded, terminated."""
        return self._weights_hold(service) if self.weights else self._version_is_there(service)

    def _version_is_there(self, service: Service) -> bool:
        version = next((v for v in service.versions if v.id == self.version_id), None)
        if version is None:
            raise self._failed(service, None)
        rollout = service.rollout
        primary = service.primary_version == version.id
        if primary and rollout is not None and rollout.version_id != version.id:
            return True  # it was complete; somebody deploys the next one already
        if primary and version.weight == 100 and service.state is ServiceState.RUNNING:
            return True
        if (
            self.canary_percent is not None
            and rollout is not None
            and rollout.version_id == version.id
            and rollout.state == "paused"
            and rollout.percent == self.canary_percent
        ):
            return True
        if version.state in ENDED:
            raise self._failed(service, version)
        if version.state is ServiceVersionState.UNHEALTHY and not _in_passing(service, version):
            raise self._failed(service, version)
        return False

    def _weights_hold(self, service: Service) -> bool:
        by_name: dict[str, ServiceVersion] = {}
        for version in sorted(service.versions, key=lambda v: v.number):
            by_name[version.name] = version
        for name, percent in self.weights.items():
            failed = by_name.get(name)
            if percent == 0 or failed is None:
                continue
            unhealthy = failed.state is ServiceVersionState.UNHEALTHY and not _in_passing(service, failed)
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
                f"Service {service.name} ({service.id}) does not go to {self.in_words} any more: "
                "another deploy superseded these weights" + _because(service.reason),
                remedy=_look(service),
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
                what += " It is kept for inspection for a while."
        elif service.state in (ServiceState.TERMINATING, ServiceState.TERMINATED):
            what += f"has ended: the service is {service.state}" + _because(service.reason)
        elif newer:
            by = max(newer, key=lambda v: v.number)
            what += f"was superseded by the deploy of {by.name} ({by.id})"
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


def _in_passing(service: Service, version: ServiceVersion) -> bool:
    """Unhealthy, but not given up: it has traffic and is being healed, or the traffic is still on its way back."""
    if service.state is ServiceState.ROLLING_BACK:
        return True
    return version.weight > 0 and version.kept_until is None


def _because(reason: str) -> str:
    return f": {reason.rstrip('.')}." if reason else "."


def _look(service: Service) -> str:
    return f"`heliostat service events {service.name}` shows what happened."
