"""The knobs of the fake load balancer."""

from __future__ import annotations

from collections import Counter

import pytest

from clouds.contract.balancer import Backend
from clouds.contract.errors import BadConfig, Denied, Throttled
from clouds.fake.balancer import FakeBalancer
from heliostat.errors import CloudError
from tests.clouds.balancer_support import SERVICE, spec


def backend(name: str, version: str = "sv_1", weight: int = 100) -> Backend:
    return Backend(id=name, version_id=version, http="10.0.0.1:8000", weight=weight)


def test_a_lost_answer_has_done_its_work() -> None:
    balancer = FakeBalancer()
    balancer.ensure(spec())
    balancer.lose_answers(1)
    with pytest.raises(CloudError, match="lost"):
        balancer.set_backends(SERVICE, 1, [backend("cl_a")])
    assert balancer.request(SERVICE).backend_id == "cl_a"
    balancer.set_backends(SERVICE, 1, [backend("cl_a")])
    assert balancer.applied == [(SERVICE, 1, [backend("cl_a")])]
    assert balancer.calls == {"ensure": 1, "set_backends": 2}


def test_a_failed_call_has_done_nothing() -> None:
    balancer = FakeBalancer()
    balancer.ensure(spec())
    balancer.fail(2)
    for _ in range(2):
        with pytest.raises(CloudError, match="fails"):
            balancer.set_backends(SERVICE, 1, [backend("cl_a")])
    assert balancer.request(SERVICE).status == 503
    balancer.set_backends(SERVICE, 1, [backend("cl_a")])
    assert balancer.request(SERVICE).status == 200


def test_refusals_and_waits() -> None:
    waited: list[float] = []
    balancer = FakeBalancer(sleep=waited.append, latency_s={"ensure": 3, "*": 1})
    balancer.throttle(1)
    with pytest.raises(Throttled):
        balancer.ensure(spec())
    balancer.bad_config = "no certificate"
    with pytest.raises(BadConfig, match="no certificate"):
        balancer.ensure(spec())
    balancer.bad_config, balancer.denied = "", "no role"
    with pytest.raises(Denied, match="no role"):
        balancer.describe(SERVICE)
    assert waited == [3, 3, 1]


def test_answers_by_backend_and_counters_that_start_anew() -> None:
    balancer = FakeBalancer(answer=lambda b, _: 500 if b.version_id == "sv_2" else 200)
    balancer.ensure(spec())
    balancer.set_backends(SERVICE, 1, [backend("cl_a", "sv_1", 3), backend("cl_b", "sv_2", 1)])
    assert Counter(balancer.request(SERVICE).status for _ in range(8)) == {200: 6, 500: 2}
    assert [c.requests for c in balancer.counters(SERVICE)] == [{"200": 6}, {"500": 2}]
    balancer.restart(SERVICE)
    assert [c.requests for c in balancer.counters(SERVICE)] == [{}, {}]
