"""Which machine type is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from clouds.gcp.machines import catalogue
from clouds.gcp.machines.catalogue import Catalogue, parts
from tests.clouds.gcp.support import config, served, session
from tests.lab.gce import GceFake

GIB = 2**30


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ({"cpu": 2}, "e2-standard-2"),
        ({"cpu": 3.5}, "e2-standard-4"),
        ({"cpu": 2, "memory": 60 * GIB}, "e2-highmem-8"),
        ({"cpu": 2, "memory": 1 * GIB}, "e2-highcpu-2"),
        ({"cpu": 150}, "c3-standard-176"),
        ({"memory": 1900 * GIB}, "m1-ultramem-80"),
        ({"gpu": 1}, "n1-standard-4/nvidia-tesla-t4:1"),
        ({"gpu": 1, "accelerator": "nvidia-l4"}, "g2-standard-4"),
        ({"gpu": 8, "accelerator": "nvidia-h100-80gb"}, "a3-highgpu-8g"),
        ({"gpu": 3, "accelerator": "nvidia-l4"}, "g2-standard-48"),
        ({"cpu": 4, "architecture": "arm64"}, "c4a-standard-4"),
    ],
)
def test_the_smallest_that_fits(asked: dict[str, float], first: str) -> None:
    assert catalogue.shipped().candidates(**asked)[0].name == first  # type: ignore[arg-type]


def test_what_nothing_has() -> None:
    shipped = catalogue.shipped()
    assert shipped.candidates(cpu=shipped.max_cpu + 1) == []
    assert shipped.candidates(memory=shipped.max_memory + 1) == []
    assert shipped.candidates(gpu=shipped.max_gpu + 1) == []
    assert shipped.candidates(gpu=1, accelerator="nvidia-none") == []


def test_only_what_the_operator_allows() -> None:
    some = catalogue.shipped().only(["n1-standard-4", "n2-standard-8", "of a later year"])
    assert [t.name for t in some.candidates(cpu=2)] == ["n1-standard-4", "n2-standard-8"]
    assert some.max_cpu == 8
    assert some.max_gpu == 0


def test_names() -> None:
    assert parts("e2-standard-4") == ("e2-standard-4", "", 0)
    assert parts("n1-standard-8/nvidia-tesla-t4:2") == ("n1-standard-8", "nvidia-tesla-t4", 2)
    for odd in ("", "../x", "e2-standard-4/t4", "e2 standard", "n1-standard-8/t4:x"):
        assert parts(odd) is None


@pytest.mark.long  # google-cloud-compute takes its time to read a thousand types
def test_it_is_made_anew_from_a_zone(tmp_path: Path) -> None:
    fake = GceFake()
    zone = "us-central1-a"
    google = session(served(fake))
    listed = google.call("MachineTypes", "list", {"zone": zone}, "list machine types")
    found = catalogue.refreshed(listed)
    assert found.types["g2-standard-24"].gpu == 2
    assert found.types["t2a-standard-4"].architecture == "arm64"
    assert not found.types["e2-micro"].choosable, "its CPUs are shared"
    assert found.types["c4a-standard-1"].disk == "hyperdisk-balanced"
    assert "n1-standard-4/nvidia-tesla-t4:1" in found.types
    shipped = catalogue.shipped().types
    assert {n: t for n, t in found.types.items() if n != "e2-micro"} == shipped, "as the one that ships says"
    catalogue.save(found, tmp_path / "c.csv")
    assert catalogue.load(tmp_path / "c.csv").types == found.types
    assert config().instance_type in shipped
    assert Catalogue([]).max_cpu == 0
