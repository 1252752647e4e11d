"""What a cloud's load balancer must do; ``tests/clouds/contract/test_balancer.py`` runs it against every provider."""

from __future__ import annotations

from typing import Protocol

from pydantic import Field

from heliostat.models.common import Model, Result


class EndpointSpec(Model):
    """One service's endpoint. The same service always gives the same bytes, except for ``grpc``."""

    service_id: str
    service_name: str
    installation_id: str
    grpc: bool = False
    """One of its applications speaks gRPC: requests of content type ``application/grpc`` go to the gRPC addresses."""


class Endpoint(Result):
    service_id: str
    url: str
    """Where people reach it, without a slash at its end: ``http://…`` or ``https://…``; gRPC at the same host and
    port."""
    state: str = "ready"
    """``ready``, or what it waits for."""


class Backend(Model):
    """One cluster of one version: its head's proxy."""

    id: str
    """The cluster's."""
    version_id: str
    http: str
    """``ip:port``."""
    grpc: str = ""
    weight: int = Field(ge=0)
    """Of this backend's *version*, the same for each of its clusters that have traffic: the version's share is weight /
    sum over versions, its clusters share it alike. 0: no traffic but that which names the backend
    (``BACKEND_HEADER``)."""


class BackendCounters(Result):
    """Since the load balancer's start; a smaller number than before means that it has restarted. An attempt that is
    retried on another backend counts at both."""

    backend_id: str
    version_id: str
    requests: dict[str, int] = {}
    """By status code, e.g. ``{"200": 17}``."""
    up: bool = True
    """By the load balancer's own health checks."""


class LoadBalancer(Protocol):
    """Endpoints of one cloud's services, in the data plane: they answer on while the control plane is away.

    What every implementation does with a request: it is sent to one of the backends by weight, or to the one that
    ``heliostat.models.services.resource.BACKEND_HEADER`` names (503 when there is none such); one whose
    backend does not take it
    (connection refused or reset before the answer began) is tried on another if its method is idempotent; streams,
    websockets, large bodies and gRPC pass; a backend that does not answer ``GET /-/healthz`` gets no traffic, unless
    it is the only one that may have any. Tokens are checked by the backends.
    """

    def ensure(self, spec: EndpointSpec, *, make: bool = True) -> Endpoint:
        """Makes the endpoint, or repairs it: starts what does not run, rewrites what is missing or corrupt,
        takes a renewed certificate. Its URL stays the same for the service's life. Without backends it answers 503.

        Args:
            make: whether to make one where there is none; else that is Gone.

        Raises BadConfig (its port is taken by another program, its certificate is unreadable), BackendsLost, Denied,
        Throttled; any other CloudError may be tried again."""
        ...

    def set_backends(self, service_id: str, revision: int, backends: list[Backend]) -> None:
        """Replaces all backends and weights at once; returns when new requests use them. Requests in flight are not
        touched. Repeating the last call (same revision, same backends) is safe. Raises Outdated, and changes nothing,
        for a smaller revision than the last one's and for other backends under the same one; Gone when the endpoint
        does not exist."""
        ...

    def counters(self, service_id: str) -> list[BackendCounters]:
        """Of the backends that it has now. Raises Gone."""
        ...

    def describe(self, service_id: str) -> Endpoint | None:
        """None: there is none. Its ``state`` is ``ready`` only if there is nothing to be done for it by ``ensure`` or
        ``set_backends``. Cheap: the monitor asks for every service every few seconds. Raises Denied; any other
        CloudError may be tried again."""
        ...

    def remove(self, service_id: str) -> None:
        """Ends it and all that belongs to it. Already gone is done."""
        ...

    def list_owned(self, installation_id: str) -> list[str]:
        """Service ids of every endpoint that carries our owner tag with this installation's id."""
        ...
