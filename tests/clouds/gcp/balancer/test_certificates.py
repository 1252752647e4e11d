"""A certificate that was renewed, which Google knows by another name, reaches endpoints that are there."""

from __future__ import annotations

import pytest

from clouds.gcp.balancer.load_balancing import GcpBalancer
from clouds.gcp.balancer.url_map import base
from heliostat.errors import CloudError
from tests.clouds.balancer_support import SERVICE, spec
from tests.clouds.gcp.support import config, served, session
from tests.lab.gce import GceFake

AT = "projects/acme-prod-1/regions/us-central1/sslCertificates"
SET = "setSslCertificates targetHttpsProxies"


@pytest.fixture
def google() -> GceFake:
    return GceFake(op_s=0)


def balancer(fake: GceFake, *names: str) -> GcpBalancer:
    """As it is opened from a config with these."""
    chosen = config(balancer_certificates=[f"{AT}/{name}" for name in names])
    return GcpBalancer(chosen, session(served(fake)), poll_s=0.01, propagation_s=0)


def shown(fake: GceFake) -> list[str]:
    proxy = fake.resources["regions/us-central1", "targetHttpsProxies", base(SERVICE)]
    return [link.rpartition("/")[2] for link in proxy["sslCertificates"]]


def test_it_is_taken_over_once_and_the_url_stays(google: GceFake) -> None:
    old, new = balancer(google, "wild-1"), balancer(google, "wild-2", "other")
    first = old.ensure(spec())
    assert old.describe(SERVICE) == first
    seen = new.describe(SERVICE)
    assert seen is not None
    assert "certificates must be changed" in seen.state, "by which whoever looks after it knows"
    assert seen.url == first.url
    assert new.ensure(spec(), make=False) == first == new.describe(SERVICE)
    assert shown(google) == ["wild-2", "other"]
    new.ensure(spec())
    assert google.calls[SET] == 1
    assert not any(call.endswith(" sslCertificates") for call in google.calls), "people's own: none is deleted"


def test_a_lost_answer_is_made_good_by_the_next_call(google: GceFake) -> None:
    balancer(google, "wild-1").ensure(spec())
    new = balancer(google, "wild-2")
    google.fail("503", SET.partition(" ")[0], times=9)
    with pytest.raises(CloudError):
        new.ensure(spec())
    assert shown(google) == ["wild-1"]
    google.heal()
    google.fail("lost", SET.partition(" ")[0])
    with pytest.raises(CloudError):
        new.ensure(spec())
    assert new.ensure(spec()).state == "ready"
    assert shown(google) == ["wild-2"]


def test_a_proxy_that_is_gone_is_made_again(google: GceFake) -> None:
    found = balancer(google, "wild-1")
    first = found.ensure(spec())
    del google.resources["regions/us-central1", "targetHttpsProxies", base(SERVICE)]
    seen = found.describe(SERVICE)
    assert seen is not None
    assert "target proxy must be created" in seen.state
    assert found.ensure(spec()) == first
    assert shown(google) == ["wild-1"]
