"""Endpoints of services: what the workflow is told of a load balancer's refusals."""

from __future__ import annotations

import pytest
from temporalio.exceptions import ApplicationError

from activities.endpoints import EndpointActivities, EnsureEndpoint, SetBackends
from clouds.contract.balancer import Backend
from clouds.fake.balancer import FakeBalancer
from heliostat.models.common import new_id


def backend(name: str) -> Backend:
    return Backend(id=name, version_id="sv_1", http="10.0.0.1:8000", weight=100)


def test_an_older_revision_is_an_error_that_says_which_one_it_must_be_above() -> None:
    balancer, service = FakeBalancer(), new_id("svc")
    activities = EndpointActivities({"cloud_1": balancer}, "inst_1")
    activities.ensure_endpoint(EnsureEndpoint(cloud_id="cloud_1", service_id=service, service_name="chat"))

    def set_backends(revision: int, name: str) -> None:
        request = SetBackends(cloud_id="cloud_1", service_id=service, revision=revision, backends=[backend(name)])
        activities.set_backends(request)

    set_backends(7, "cl_a")
    for revision in (1, 7):
        with pytest.raises(ApplicationError, match="revision 7") as caught:
            set_backends(revision, "cl_b")
        assert (caught.value.type, caught.value.non_retryable, caught.value.details) == ("outdated", True, (7,))
    set_backends(7, "cl_a")
    set_backends(8, "cl_b")
    assert [revision for _, revision, _ in balancer.applied] == [7, 8]
