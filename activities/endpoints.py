"""Endpoints of services: what is said to a cloud's load balancer. Sync, for cloud SDKs are; run on the worker's
threads.

Undo: ``remove_endpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.nodes import as_failure
from clouds.contract.balancer import Backend, Endpoint, EndpointSpec, LoadBalancer
from clouds.contract.errors import BackendsLost, BadConfig, Denied, Gone, Outdated
from heliostat.errors import CloudError
from heliostat.models.common import Model

FINAL = (BackendsLost, BadConfig, Denied, Gone, Outdated)
"""What another try of the same call does not cure."""


class EnsureEndpoint(Model):
    cloud_id: str
    service_id: str
    service_name: str
    grpc: bool = False


class SetBackends(Model):
    cloud_id: str
    service_id: str
    revision: int
    """Grows with each change: a late call never undoes a newer one."""
    backends: list[Backend]


class EndpointRef(Model):
    cloud_id: str
    service_id: str


class EndpointActivities:
    """Carries the load balancers by cloud id."""

    def __init__(self, balancers: Mapping[str, LoadBalancer], installation_id: str) -> None:
        self._balancers = balancers
        self._installation_id = installation_id

    def _balancer(self, cloud_id: str) -> LoadBalancer:
        try:
            return self._balancers[cloud_id]
        except KeyError:
            raise ApplicationError(
                f"This worker does not serve the cloud {cloud_id}: it was deleted, or it is another server's own.",
                type="unavailable",
            ) from None

    @activity.defn
    def ensure_endpoint(self, endpoint: EnsureEndpoint) -> Endpoint:
        """Makes it, or heals what of it does not run. Repeatable. Type ``backends_lost``: it is there, and wants to be
        told its backends."""
        balancer = self._balancer(endpoint.cloud_id)
        spec = EndpointSpec(
            service_id=endpoint.service_id,
            service_name=endpoint.service_name,
            installation_id=self._installation_id,
            grpc=endpoint.grpc,
        )
        try:
            return balancer.ensure(spec)
        except CloudError as error:
            raise _failure(error) from error

    @activity.defn
    def set_backends(self, request: SetBackends) -> None:
        """Returns when new requests go by these weights. Type ``gone``: make the endpoint first. Type ``outdated``: it
        has a newer revision, which is the error's first detail; say what is wanted under a greater one."""
        try:
            self._balancer(request.cloud_id).set_backends(request.service_id, request.revision, request.backends)
        except CloudError as error:
            raise _failure(error) from error

    @activity.defn
    def remove_endpoint(self, ref: EndpointRef) -> None:
        """Already gone is done."""
        try:
            self._balancer(ref.cloud_id).remove(ref.service_id)
        except CloudError as error:
            raise _failure(error) from error


def _failure(error: CloudError) -> ApplicationError:
    failure = as_failure(error)
    return ApplicationError(
        failure.message,
        *([error.details["revision"]] if isinstance(error, Outdated) else []),
        type=failure.type,
        non_retryable=isinstance(error, FINAL),
        next_retry_delay=failure.next_retry_delay,
    )
