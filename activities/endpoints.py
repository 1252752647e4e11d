"""Endpoints of services: calls of a cloud's load balancer. Sync, as the clouds' SDKs are; they run on the worker's
threads.

Undo: ``remove_endpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.cloud_calls import as_failure, part_of
from clouds.contract.balancer import Backend, Endpoint, EndpointSpec, LoadBalancer
from clouds.contract.errors import BackendsLost, BadConfig, Denied, Gone, Outdated
from heliostat.errors import CloudError
from heliostat.models.common import Model

FINAL = (BackendsLost, BadConfig, Denied, Gone, Outdated)
"""Another try of the same call does not cure these."""


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

    @activity.defn
    def ensure_endpoint(self, endpoint: EnsureEndpoint) -> Endpoint:
        """Creates it, or repairs what of it does not run. Repeatable. Type ``backends_lost``: it exists, and needs its
        backends set again."""
        balancer = part_of(self._balancers, endpoint.cloud_id)
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
        """Returns when new requests use these weights. Type ``gone``: create the endpoint first. Type ``outdated``: it
        has a newer revision, which is the error's first detail; set the backends under a greater one."""
        try:
            part_of(self._balancers, request.cloud_id).set_backends(
                request.service_id, request.revision, request.backends
            )
        except CloudError as error:
            raise _failure(error) from error

    @activity.defn
    def remove_endpoint(self, ref: EndpointRef) -> None:
        """Already gone is done."""
        try:
            part_of(self._balancers, ref.cloud_id).remove(ref.service_id)
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
