"""The permissions that are granted hold every call that is made, and no more."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from clouds.contract.balancer import Backend
from clouds.gcp.account.session import Session
from clouds.gcp.balancer.load_balancing import GcpBalancer
from clouds.gcp.setup import rights
from clouds.gcp.setup.verify import checks
from tests.clouds.balancer_support import spec as endpoint
from tests.clouds.gcp.support import config, machines, served, session
from tests.clouds.support import OURS, ROOT, Cloud
from tests.lab import gce_project
from tests.lab.gce import GceFake

ALL = {**rights.MACHINES, **rights.BALANCERS, **rights.LOOKS}


def written() -> set[rights.Call]:
    """Calls that the source names both parts of."""
    found = set()
    for path in Path(ROOT / "clouds" / "gcp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
                "call",
                "held",
            ):
                given = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                if len(given) >= 2 and given[0][:1].isupper():
                    found.add((given[0], given[1]))
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> set[rights.Call]:
    """Calls that are made from now on."""
    calls: set[rights.Call] = set()
    real = Session.call

    def call(self: Session, client: str, method: str, *args: object, **kwargs: object) -> object:
        calls.add((client, method))
        return real(self, client, method, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "call", call)
    return calls


def test_every_call_that_is_written_has_its_permissions() -> None:
    assert len(written()) > 10, "they are found at all"
    assert written() <= set(ALL)
    assert all(ALL.values())


@pytest.mark.long
def test_every_call_that_is_made_has_its_permissions(made: set[rights.Call], tmp_path: Path) -> None:
    fake = GceFake(op_s=0.05)
    gce_project.furnish(fake)
    url, certificate = served(fake), "projects/acme-prod-1/regions/us-central1/sslCertificates/c"
    cloud = Cloud(machines(url), tmp_path / "boots")
    machine = cloud.machines.launch(cloud.spec(cluster_id="cl_a"))
    backend = Backend(id="cl_a", version_id="sv_1", http=f"{machine.ip}:8000", grpc=f"{machine.ip}:9000", weight=100)
    for fields in ({}, {"balancer_certificates": [certificate]}):
        chosen = config(**fields)
        balancer = GcpBalancer(chosen, session(url), poll_s=0.01, health_wait_s=0.05, propagation_s=0)
        asked = endpoint("svc_1", grpc=bool(fields))
        balancer.ensure(asked)
        balancer.set_backends("svc_1", 1, [backend])
        balancer.counters("svc_1")
        balancer.list_owned(OURS)
        if fields:
            renewed = config(balancer_certificates=[f"{certificate}2"])
            GcpBalancer(renewed, session(url), poll_s=0.01, propagation_s=0).ensure(asked)
        balancer.remove("svc_1")
        checks(session(url), chosen, installation_id=OURS, api_url="https://heliostat.acme.example")
    own = "projects/acme-prod-1/global/images/gpu-image"
    checks(session(url), config(image=own), installation_id=OURS, api_url="https://heliostat.acme.example")
    cloud.machines.console_output(machine.machine_id)
    cloud.machines.terminate([machine.machine_id])
    assert made <= set(ALL)
    assert set(ALL) <= made | written(), "and no entry is for a call that nobody makes"


def test_the_custom_role_is_of_permissions_that_google_has() -> None:
    role = rights.custom_role()
    assert role == sorted(set(role))
    assert all(permission.startswith("compute.") and permission.count(".") == 2 for permission in role)
    assert len(role) < 300, "more need not fit into a custom role"
    needs_nothing = rights.of_machines(config())
    assert "compute.subnetworks.useExternalIp" not in needs_nothing
    assert "compute.instances.setTags" in rights.of_machines(config(network_tags=["ours"]))
    assert not set(needs_nothing) & set(rights.of_balancers())
