"""What heads hand on (``tests/clouds/contract/test_retained.py``), on Compute Engine's fake, and what is
Google's own of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clouds.contract.retained import DEVICES, RetainedResources
from clouds.gcp.machines.retained import name_for
from heliostat.errors import CloudError
from tests.clouds.contract.test_retained import *  # noqa: F403 # the suite, with the cloud below
from tests.clouds.contract.test_retained import BOTH, HAD, end, handed_over, head, launched, left, released
from tests.clouds.gcp.support import gcp_cloud
from tests.clouds.support import Cloud
from tests.lab.gce import GceFake

pytestmark = pytest.mark.long  # starts the fake of the whole cloud

A, B = "us-central1-a", "us-central1-b"


@pytest.fixture
def both(tmp_path: Path) -> Iterator[tuple[Cloud, GceFake]]:
    with gcp_cloud(tmp_path) as found:
        yield found


@pytest.fixture
def cloud(both: tuple[Cloud, GceFake]) -> Cloud:
    return both[0]


def test_too_early_and_too_late(cloud: Cloud) -> None:
    """It has the disk since its insert, so there is no such moment."""
    machine = cloud.machines.launch(head(cloud))
    end(cloud, machine)
    cloud.machines.attach_retained("clu_1", machine.machine_id)


def instance(fake: GceFake) -> dict[str, Any]:
    (found,) = [r for key, r in fake.resources.items() if key[1] == "instances"]
    return found


def test_disk_and_address_are_googles_own_and_labelled(both: tuple[Cloud, GceFake]) -> None:
    cloud, fake = both
    name = name_for("clu_1")
    cloud.machines.launch(head(cloud, user_data=f"mount {DEVICES}", tags={"team": "blue"}))
    disk, address = (
        fake.resources[f"zones/{A}", "disks", name],
        fake.resources["regions/us-central1", "addresses", name],
    )
    assert disk["sizeGb"] == "20"
    assert disk["type"] == f"zones/{A}/diskTypes/pd-balanced"
    assert disk["labels"]["heliostat-cluster"] == "clu_1"
    assert disk["labels"]["team"] == "blue"
    assert "heliostat-node" not in disk["labels"]
    assert (address["addressType"], address["subnetwork"]) == ("INTERNAL", "regions/us-central1/subnetworks/default")
    machine = instance(fake)
    assert machine["networkInterfaces"][0]["networkIP"] == address["address"]
    kept = machine["disks"][1]
    assert (kept["deviceName"], kept.get("autoDelete", False)) == ("heliostat-kept", False)
    metadata = {item["key"]: item["value"] for item in machine["metadata"]["items"]}
    assert metadata["startup-script"] == "mount /dev/disk/by-id/google-heliostat-kept"


def test_a_zone_without_machines_leaves_no_disk(both: tuple[Cloud, GceFake]) -> None:
    cloud, fake = both
    fake.fail("stockout", "insert", zone=A)
    machine = cloud.machines.launch(cloud.spec(keep=BOTH))
    assert {key[0] for key in fake.resources if key[1] == "disks"} == {f"zones/{B}"}
    handed_over(cloud, machine)
    end(cloud, machine)
    assert launched(cloud, cloud.spec(keep=HAD, generation=2)).ip == machine.ip, "whatever zone is named"
    assert instance(fake)["zone"].endswith(B)


def test_what_a_late_failure_leaves_elsewhere_is_deleted(both: tuple[Cloud, GceFake]) -> None:
    cloud, fake = both
    fake.fail("late", "insert", zone=A, error=("INTERNAL_ERROR", 500, "Internal error."))
    with pytest.raises(CloudError):
        cloud.machines.launch(head(cloud))
    machine = launched(cloud, head(cloud, zone=1, generation=2))
    assert len([key for key in fake.resources if key[1] == "disks"]) == 2
    handed_over(cloud, machine)
    assert [key[0] for key in fake.resources if key[1] == "disks"] == [f"zones/{B}"]
    end(cloud, machine)
    released(cloud)
    assert not [key for key in fake.resources if key[1] in ("disks", "addresses")]


def test_a_head_that_has_stopped_itself_holds_both_until_it_is_deleted(both: tuple[Cloud, GceFake]) -> None:
    cloud, fake = both
    first = cloud.machines.launch(head(cloud))
    handed_over(cloud, first)
    fake.stop_itself(first.machine_id)
    with pytest.raises(CloudError, match="already being used"):
        cloud.machines.launch(head(cloud, keep=HAD, generation=2))
    with pytest.raises(CloudError, match="already being used"):
        cloud.machines.attach_retained("clu_1", None)
    assert left(cloud) == []
    cloud.machines.terminate([first.machine_id])
    assert launched(cloud, head(cloud, keep=HAD, generation=3)).ip == first.ip


def test_an_address_of_another_installation_is_left_alone(both: tuple[Cloud, GceFake]) -> None:
    cloud, fake = both
    machine = cloud.machines.launch(head(cloud, keep=RetainedResources(address=True), installation_id="another"))
    end(cloud, machine)
    assert left(cloud) == []
    assert [key for key in fake.resources if key[1] == "addresses"]
