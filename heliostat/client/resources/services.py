"""Services: deploy, get, wait for a version, control its rollout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from heliostat.client.effects import Emit, Flow, Sleep, Stream
from heliostat.client.groups import Group, M, many, one
from heliostat.client.logs import LogText, follow_pages
from heliostat.client.resources import lists
from heliostat.client.resources.rollouts import Target, commanded, reached
from heliostat.client.resources.uploads import ship_services
from heliostat.client.transport import PATIENT, TRIES, Api, path_of
from heliostat.errors import InvalidRequest, WaitTimeout
from heliostat.models.common import Event
from heliostat.models.jobs import LogPage
from heliostat.models.services import (
    QueryToken,
    RolloutAction,
    RolloutCommand,
    Service,
    ServiceConfig,
    ServiceDeploy,
    ServiceRollback,
    ServiceState,
    ServiceTerminate,
    ServiceVersion,
)

SERVICES = "services"
WATCH_S = 1.0
"""Between two polls of a watch: as often as the heads report."""


class Services(Group[M]):
    @one
    def deploy(
        self,
        what: ServiceConfig | ServiceDeploy,
        *,
        in_place: bool | None = None,
        canary_percent: int | None = None,
        max_surge_percent: int | None = None,
        idempotency_key: str | None = None,
    ) -> Flow[Service]:
        """Deploys a version. Returns as soon as it is accepted, which is durable; ``wait_deployed`` waits for it.

        Packs and uploads local directories first, also those of the applications' runtime environments.

        Args:
            what: the config of one new version, or a ``ServiceDeploy``, which excludes the options below.
            in_place, canary_percent, max_surge_percent: see ``ServiceDeploy``.
            idempotency_key: the same key (any text) deploys once, however often it is sent.
        """
        options = {
            "in_place": in_place,
            "canary_percent": canary_percent,
            "max_surge_percent": max_surge_percent,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(what, ServiceDeploy) and given:
            raise InvalidRequest(
                f"{', '.join(given)} can't be combined with a ServiceDeploy.", remedy="Set it in the ServiceDeploy."
            )
        deploy = what if isinstance(what, ServiceDeploy) else ServiceDeploy.model_validate({"config": what, **given})
        if deploy.config is not None:
            (config,) = yield from ship_services(self._api, [deploy.config])
            deploy = deploy.model_copy(update={"config": config})
        elif deploy.configs:
            deploy = deploy.model_copy(update={"configs": (yield from ship_services(self._api, deploy.configs))})
        return (yield from self._api.call("POST", path_of(SERVICES), Service, body=deploy, key=idempotency_key))

    @one
    def get(self, ref: str, *, project: str | None = None) -> Flow[Service]:
        """By id or name. ``project``, here and below: the project of the name; needed only when several of your
        projects have it."""
        return (yield from get(self._api, ref, project))

    @many
    def list(
        self,
        *,
        state: ServiceState | str | Sequence[ServiceState | str] | None = None,
        name: str | None = None,
        project: str | None = None,
        cloud: str | None = None,
        tags: Mapping[str, str] | None = None,
        page_size: int = lists.PAGE_SIZE,
    ) -> Stream[Service]:
        """Newest first, without query tokens; pages are fetched as you iterate."""
        filters = {"state": state, "name": name, "project": project, "cloud": cloud, "tag": lists.tag_filter(tags)}
        return lists.pages(self._api, path_of(SERVICES), Service, page_size=page_size, **filters)

    @many
    def versions(self, ref: str, *, project: str | None = None) -> Stream[ServiceVersion]:
        """Every version that it has ever had, newest first."""
        return lists.pages(self._api, path_of(SERVICES, ref, "versions"), ServiceVersion, project=project)

    @many
    def events(self, ref: str, *, project: str | None = None) -> Stream[Event]:
        """Its events, oldest first."""
        return lists.events(self._api, SERVICES, ref, project)

    @many
    def logs(
        self,
        ref: str,
        *,
        version: str | None = None,
        follow: bool = False,
        tail: int | None = None,
        project: str | None = None,
    ) -> Stream[LogText]:
        """The logs of its applications and nodes; the ``stream`` of each piece names node and file.

        Args:
            version: only this version, by name or id. Default: all.
            follow: continue until the service is terminated. Survives outages of the API.
            tail: start with this many of the last lines.
        """
        service = yield from get(self._api, ref, project)
        pages = partial(_page, self._api, service.id, version, follow)
        yield from follow_pages(self._api, pages, follow, tail)

    @many
    def watch(self, ref: str, *, project: str | None = None) -> Stream[Service]:
        """The service every second, with its traffic, until it is terminated. Survives outages of the API."""
        service = yield from get(self._api, ref, project)
        while True:
            yield Emit(service)
            if service.state.settled:
                return
            yield Sleep(WATCH_S)
            service = yield from get(self._api, service.id, tries=PATIENT)

    @one
    def wait(
        self,
        ref: str,
        *,
        state: ServiceState | str = ServiceState.RUNNING,
        timeout: float | None = None,
        on_change: Callable[[Service], None] | None = None,
        project: str | None = None,
    ) -> Flow[Service]:
        """Waits until the service is in ``state``, at most ``timeout`` seconds (default: no limit). Survives outages of
        the API. ``on_change`` gets the service at first and after each change.

        Raises WorkloadFailed as soon as the service can no longer reach the state; WaitTimeout.
        """
        wanted = ServiceState(state)
        service = yield from get(self._api, ref, project)
        return (yield from _until(self._api, service, lambda s: reached(s, wanted), str(wanted), timeout, on_change))

    @one
    def wait_deployed(
        self,
        service: Service,
        deploy: ServiceDeploy | None = None,
        *,
        timeout: float | None = None,
        on_change: Callable[[Service], None] | None = None,
    ) -> Flow[Service]:
        """Waits until a deploy is complete: its version is the primary one with all the traffic, and the service is
        RUNNING; with ``canary_percent``, the rollout is paused there; with ``versions``, their weights apply.

        Args:
            service: the answer of ``deploy``, which identifies the version.
            deploy: the request. Default: all the traffic for the newest version.

        Raises WorkloadFailed when the version is unhealthy, rolled back, or replaced by another deploy; WaitTimeout.
        """
        target = Target.of(service, deploy)
        return (yield from _until(self._api, service, target.reached, target.in_words, timeout, on_change))

    @one
    def wait_steered(
        self,
        before: Service,
        action: RolloutAction | str | None = None,
        *,
        percent: int | None = None,
        timeout: float | None = None,
        on_change: Callable[[Service], None] | None = None,
    ) -> Flow[Service]:
        """Waits until a command has taken effect. After ``rollback``, or ``rollout`` with ``abort``: the previous
        version has the traffic and the other one is abandoned. After ``promote`` and ``resume``: the new version has
        all the traffic, or the rollout is paused at its percentage.

        Args:
            before: the service as ``get`` returned it *before* the command: the starting point of the comparison.
            action: the action of ``rollout``; None: ``rollback`` was called.
            percent: as with ``promote``.

        Raises WorkloadFailed when the command can no longer succeed; WaitTimeout.
        """
        wanted = RolloutAction(action) if action is not None else None
        if wanted is RolloutAction.PAUSE:
            raise InvalidRequest("A pause takes effect at once.", remedy="There is nothing to wait for.")
        target = commanded(before, wanted, percent)
        service = yield from get(self._api, before.id)
        return (yield from _until(self._api, service, target.reached, target.in_words, timeout, on_change))

    @one
    def terminate(self, ref: str, *, reason: str = "", project: str | None = None) -> Flow[Service]:
        """Requests termination: its versions are drained, then their clusters released; wait for TERMINATED to see it
        done. You can deploy under the same name again."""
        path, params = path_of(SERVICES, ref, "terminate"), {"project": project}
        return (yield from self._api.call("POST", path, Service, params=params, body=ServiceTerminate(reason=reason)))

    @one
    def delete(self, ref: str, *, project: str | None = None) -> Flow[None]:
        """Deletes a terminated service with its tokens, versions and events."""
        path, params = path_of(SERVICES, ref), {"project": project}
        return (yield from self._api.call("DELETE", path, type(None), params=params))

    @one
    def rollback(self, ref: str, *, reason: str = "", project: str | None = None) -> Flow[Service]:
        """Returns to the previous version: aborts the current rollout or, without one, makes the version before the
        primary one primary again."""
        path, params = path_of(SERVICES, ref, "rollback"), {"project": project}
        return (yield from self._api.call("POST", path, Service, params=params, body=ServiceRollback(reason=reason)))

    @one
    def rollout(
        self,
        ref: str,
        action: RolloutAction | str,
        *,
        percent: int | None = None,
        project: str | None = None,
    ) -> Flow[Service]:
        """Controls the current rollout: ``pause`` it at its percentage, ``resume`` it, ``promote`` the new version to
        ``percent`` of the traffic (default: all) without further steps, or ``abort`` it."""
        fields = {"action": action} | ({"percent": percent} if percent is not None else {})
        path, params = path_of(SERVICES, ref, "rollout"), {"project": project}
        body = RolloutCommand.model_validate(fields)
        return (yield from self._api.call("POST", path, Service, params=params, body=body))

    @one
    def add_token(
        self, ref: str, *, project: str | None = None, idempotency_key: str | None = None
    ) -> Flow[QueryToken]:
        """Creates a second query token; the first one stays valid until ``delete_token``."""
        path, params = path_of(SERVICES, ref, "tokens"), {"project": project}
        return (yield from self._api.call("POST", path, QueryToken, params=params, key=idempotency_key))

    @one
    def delete_token(self, ref: str, token_id: str | None = None, *, project: str | None = None) -> Flow[None]:
        """Deletes a query token: requests that carry it are refused. Default: the primary one; the other becomes
        primary."""
        path, params = path_of(SERVICES, ref, "tokens"), {"id": token_id, "project": project}
        return (yield from self._api.call("DELETE", path, type(None), params=params))


def get(api: Api, ref: str, project: str | None = None, *, tries: float = TRIES) -> Flow[Service]:
    return (yield from api.call("GET", path_of(SERVICES, ref), Service, params={"project": project}, tries=tries))


def _until(
    api: Api,
    service: Service,
    done: Callable[[Service], bool],
    wanted: str,
    timeout: float | None,
    on_change: Callable[[Service], None] | None,
) -> Flow[Service]:
    pace = lists.Pace(timeout)
    seen: Service | None = None
    while True:
        if on_change and service != seen:
            on_change(service)
        seen = service
        if done(service):
            return service
        if pace.expired:
            waits = f" (waits for {service.waits_for})" if service.waits_for else ""
            raise WaitTimeout(
                f"Service {service.name} ({service.id}) is {service.state}{waits} after {timeout:g} s, not {wanted}.",
                remedy=f"It is not affected. `heliostat service status {service.name}` shows what it waits for.",
                resource=service.id,
            )
        yield Sleep(pace.next())
        service = yield from get(api, service.id, tries=TRIES if timeout is not None else PATIENT)


def _page(api: Api, service_id: str, version: str | None, follow: bool, *, tries: float) -> Flow[LogPage]:
    params = {"version": version, "follow": follow or None}
    return (yield from api.call("GET", path_of(SERVICES, service_id, "logs"), LogPage, params=params, tries=tries))
