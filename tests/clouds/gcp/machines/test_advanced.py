"""``advanced_instance_config`` on Google Cloud: it goes over our request, but never over what is ours."""

from __future__ import annotations

from typing import Any

import pytest

from clouds.contract.errors import BadConfig
from clouds.gcp.machines import advanced as gcp
from clouds.gcp.machines import instance
from clouds.gcp.machines.catalogue import shipped
from heliostat.models.clouds import Market
from tests.clouds.gcp.support import config
from tests.clouds.support import bare_spec


def test_gcp_by_the_rest_apis_names_and_the_clients() -> None:
    given = {
        "minCpuPlatform": "Intel Ice Lake",
        "shielded_instance_config": {"enableSecureBoot": False},
        "disks": [
            {"boot": True, "initializeParams": {"diskSizeGb": 500}},
            {"type": "SCRATCH", "initializeParams": {"diskType": "zones/z/diskTypes/local-ssd"}},
        ],
    }
    gcp.check(given)
    kind = shipped().types["e2-standard-4"]
    plain = instance.request(bare_spec(), config(), kind, "us-central1-a", Market.ON_DEMAND, {})
    found = instance.request(bare_spec(advanced=given), config(), kind, "us-central1-a", Market.ON_DEMAND, {})
    assert found["min_cpu_platform"] == "Intel Ice Lake"
    assert found["shielded_instance_config"] == plain["shielded_instance_config"] | {"enable_secure_boot": False}
    boot, scratch = found["disks"]
    ours = plain["disks"][0]
    changed = {k for k, v in boot["initialize_params"].items() if v != ours["initialize_params"][k]}
    assert changed == {"disk_size_gb", "labels"}, "a label is the request's digest"
    assert boot["initialize_params"]["disk_size_gb"] == 500
    assert (boot["auto_delete"], scratch["auto_delete"]) == (True, True)
    assert found["metadata"] == plain["metadata"]


@pytest.mark.parametrize("name", sorted(gcp.OWNED))
def test_gcp_refuses_what_is_ours_by_name(name: str) -> None:
    first, *more = name.split("_")
    for written in {name, first + "".join(part.title() for part in more)}:
        with pytest.raises(BadConfig, match=name):
            gcp.check({"min_cpu_platform": "x", written: {}})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"minCpuPlattform": "x"}, "min_cpu_plattform"),
        ({"canIpForward": "perhaps"}, "can_ip_forward"),
        ({"disks": [{"autoDelete": False}]}, "auto_delete"),
        ({"disks": [{"source": "zones/z/disks/d"}]}, "source"),
    ],
)
def test_gcp_refuses_what_an_instance_does_not_know(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadConfig) as caught:
        gcp.check(given)
    assert words in f"{caught.value.field} {caught.value.message}"


def test_an_arm_machine_boots_an_arm_image() -> None:
    kind = shipped().types["c4a-standard-4"]
    found = instance.request(bare_spec(), config(), kind, "us-central1-a", Market.ON_DEMAND, {})
    assert "arm64" in found["disks"][0]["initialize_params"]["source_image"]
