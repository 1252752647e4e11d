"""The Terraform file: it can be read, grants what ``rights`` says, and registers as a cloud."""

from __future__ import annotations

import re
from typing import Any

import hcl2
import pytest

from clouds.gcp.setup import rights
from clouds.gcp.setup.template import MAX_SLUG, slug, terraform
from heliostat.models.clouds import GcpConfig, Trust

TRUST = Trust(
    installation_id="hel_1",
    external_id="x",
    issuer="https://heliostat.acme.example",
    subject="heliostat:hel_1:org_1",
)


def text(name: str = "prod") -> str:
    return terraform(TRUST, project="acme-prod-1", region="us-central1", name=name)


@pytest.fixture(scope="module")
def read() -> dict[str, Any]:
    found: dict[str, Any] = hcl2.loads(text())
    return found


def quoted(value: str) -> str:
    return value.strip('"')


@pytest.mark.long
def test_it_grants_what_rights_says(read: dict[str, Any]) -> None:
    (held,) = read["locals"]
    lists = {name: [quoted(one) for one in held[name]] for name in ("machines", "balancers", "looks")}
    optional = {"compute.subnetworks.useExternalIp"}
    assert set(lists["machines"]) == set(rights.of_machines()) - optional
    assert lists["balancers"] == rights.of_balancers()
    assert lists["looks"] == rights.of_looks()
    assert {one for some in lists.values() for one in some} | optional == set(rights.custom_role())
    assert all(one in held["permissions"] for one in optional)
    roles = {
        quoted(name): role["permissions"]
        for block in read["resource"]
        for name, role in block.get('"google_project_iam_custom_role"', {}).items()
    }
    assert roles["control_plane"] == "${local.permissions}"
    assert [quoted(one) for one in roles["machines_objects"]] == list(rights.NODE_OBJECTS)
    assert [quoted(one) for one in roles["signer"]] == [rights.SIGN]


@pytest.mark.long
def test_whatever_it_refers_to_is_there(read: dict[str, Any]) -> None:
    there = {f"{quoted(kind)}.{quoted(name)}" for block in read["resource"] for kind in block for name in block[kind]}
    assert len(there) > 20
    wanted = set(re.findall(r"(?<!data\.)(google_[a-z_]+\.[a-z_]+)", text()))
    wanted -= {f"google_compute_zones.{name}" for name in ("region",)}
    assert wanted <= there
    variables = {quoted(name) for block in read["variable"] for name in block}
    assert set(re.findall(r"\bvar\.([a-z_]+)", text())) == variables, "no variable is asked for in vain"
    assert set(re.findall(r"\blocal\.([a-z_]+)", text())) <= set(read["locals"][0])


@pytest.mark.long
def test_nobody_is_let_in(read: dict[str, Any]) -> None:
    rules = [rule for block in read["resource"] for rule in block.get('"google_compute_firewall"', {}).values()]
    assert len(rules) == 2
    for rule in rules:
        assert '"0.0.0.0/0"' not in rule["source_ranges"]
        assert rule["target_tags"] == ["${local.full_name}"]


def test_its_output_is_a_cloud() -> None:
    """By its keys: what they refer to only Terraform knows."""
    (config,) = re.findall(r"config = \{\n(.*?)\n    \}", text(), re.DOTALL)
    keys = set(re.findall(r"^\s+([a-z_]+)\s+=", config, re.MULTILINE))
    required = {name for name, field in GcpConfig.model_fields.items() if field.is_required()}
    assert required <= keys <= set(GcpConfig.model_fields)


def test_what_people_see() -> None:
    assert "@" not in text()
    assert 'attribute_condition = "assertion.sub == \\"${var.subject}\\""' in text()
    assert TRUST.subject in text()
    assert TRUST.external_id not in re.findall(r'"(.*?)"', text())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prod", "prod"),
        ("Team.A_West-1", "team-a-west-1"),
        ("1st", "st"),
        ("x", "cx0"),
        ("9", "c0"),
        ("a" * 60, "a" * 14),
    ],
)
def test_names_become_googles(name: str, expected: str) -> None:
    assert slug(name) == expected
    assert re.fullmatch(r"[a-z][-a-z0-9]{0,12}[a-z0-9]", slug(name))
    assert len(f"heliostat-{'a' * MAX_SLUG}-node") <= 30
    assert f'name     = "{name}"' in text(name), "people know it by its own name"
