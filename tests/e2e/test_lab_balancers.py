"""Load balancers in the lab: our ALB and Google Cloud code, a Traefik driven by what the vendors were told, and hosts
as backends."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from clouds.aws.balancer.alb import AwsBalancer
from clouds.contract.balancer import Backend, EndpointSpec, LoadBalancer
from clouds.contract.machines import MachineSpec
from clouds.gcp.balancer.load_balancing import GcpBalancer
from heliostat.models.clusters import NodeRole
from heliostat.models.services import BACKEND_HEADER
from tests.clouds.gcp import support as gcp
from tests.clouds.support import OURS
from tests.lab.host import Host
from tests.lab.lab import Lab, until

pytestmark = [pytest.mark.lab, pytest.mark.long, pytest.mark.timeout(120)]

SERVE = """\
#!/bin/sh
mkdir -p /srv/www/-; cd /srv/www
hostname >index.html; echo ok >-/healthz
exec python3 -m http.server 8000
"""
SERVICE = "svc_1"


def spec(number: int) -> MachineSpec:
    names = {"token": f"t-{number}", "cluster_id": f"clu_{number}", "node_id": f"nod_{number}"}
    return MachineSpec(**names, generation=1, role=NodeRole.HEAD, installation_id=OURS, user_data=SERVE)


@pytest.fixture(params=["aws", "gcp"])
def world(lab: Lab, request: pytest.FixtureRequest) -> Iterator[tuple[LoadBalancer, list[Host]]]:
    """A vendor's load balancer and two hosts that serve."""
    balancer: LoadBalancer
    machines: Any
    trusted, lab.gcp.fake.auth.jwks = lab.gcp.fake.auth.jwks, None
    if request.param == "aws":
        machines, balancer = lab.aws.account.machines(), AwsBalancer(lab.aws.account.config, lab.aws.account.shared)
    else:
        machines = gcp.machines(lab.gcp.url)
        balancer = GcpBalancer(gcp.config(), gcp.session(lab.gcp.url), poll_s=0.1, propagation_s=0.5)
    made = [machines.launch(spec(number)).machine_id for number in (1, 2)]
    yield balancer, [lab.host(id) for id in made]
    balancer.remove(SERVICE)
    machines.terminate(made)
    until("all to be gone", lambda: not lab.hosts())
    lab.gcp.fake.auth.jwks = trusted


def ask(url: str, headers: dict[str, str] | None = None) -> str | int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=5) as answer:
            return str(answer.read().decode().strip())
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_requests_go_where_the_vendor_was_told(world: tuple[LoadBalancer, list[Host]]) -> None:
    balancer, (a, b) = world
    names = {"service_id": SERVICE, "service_name": "s", "installation_id": OURS}
    url = balancer.ensure(EndpointSpec(**names)).url
    both = [
        Backend(id="clu_1", version_id="v1", http=f"{a.ip}:8000", weight=75),
        Backend(id="clu_2", version_id="v2", http=f"{b.ip}:8000", weight=25),
    ]
    balancer.set_backends(SERVICE, 1, both)
    until("both to be served", lambda: {ask(url) for _ in range(8)} == {a.name, b.name})
    shares = Counter(ask(url) for _ in range(80))
    assert set(shares) == {a.name, b.name}
    assert 50 <= shares[a.name] <= 70

    assert {ask(url, {BACKEND_HEADER: "clu_2"}) for _ in range(10)} == {b.name}
    assert ask(url, {BACKEND_HEADER: "clu_3"}) == 503
    assert b.run("curl", "-s", url).strip() in (a.name, b.name)  # as a head's agent asks

    of_one = [backend.model_copy(update={"version_id": "v1", "weight": 1}) for backend in both]
    balancer.set_backends(SERVICE, 2, of_one)
    until("turns", lambda: {ask(url) for _ in range(8)} == {a.name, b.name})
    a.partition()
    until("the one that is cut off to get nothing", lambda: {ask(url) for _ in range(8)} == {b.name})
    until("its health to be told", lambda: not {c.backend_id: c.up for c in fresh(balancer)}["clu_1"])
    a.heal()
    until("it to get its share again", lambda: a.name in {ask(url) for _ in range(8)})

    balancer.remove(SERVICE)
    until("nobody to listen", lambda: ask(url) == 0)


def fresh(balancer: LoadBalancer) -> list[Any]:
    """Not what it has seen before."""
    getattr(balancer, "_seen", {}).clear()
    return balancer.counters(SERVICE)
