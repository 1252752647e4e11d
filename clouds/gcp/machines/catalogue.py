"""Machine types of Compute Engine: their size, and which one fits a request.

``catalogue.csv`` ships with us, without prices. It is made from Google's public pages "General-purpose",
"Compute-optimized", "Memory-optimized" and "Accelerator-optimized machine family" and "GPU machine types"
(https://cloud.google.com/compute/docs/machine-resource, as of 2026-09). An operator's own, from what zones offer to a
project, stands before it; the API and the workers read it when they start:

    export GOOGLE_OAUTH_ACCESS_TOKEN=$(gcloud auth print-access-token)
    python -m clouds.gcp.machines.catalogue refresh --project acme-prod --zone us-central1-a --zone us-central1-b

A type with GPUs that are attached to it, which only N1 has, is written ``n1-standard-8/nvidia-tesla-t4:1``.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clouds import instance_types

SHIPPED = Path(__file__).with_name("catalogue.csv")
OWN = "gcp-types.csv"
"""The operator's, in HELIOSTAT_HOME."""
FAMILIES = ("e2", "n2", "n2d", "g2", "n1", "a2", "a3")
"""These come first, as they are offered in the most regions and zones."""
HYPERDISK_ONLY = ("n4", "c4", "c4a", "c4d", "x4", "a4", "a3-ultragpu")
"""Families that take no persistent disk (https://cloud.google.com/compute/docs/disks/hyperdisks)."""
_NAME = re.compile(r"(?P<machine>[a-z0-9-]+)(/(?P<accelerator>[a-z0-9-]+):(?P<count>\d{1,2}))?")


@dataclass(frozen=True)
class MachineType(instance_types.InstanceType):
    """Types of old families are choosable only with a GPU."""

    disk: str
    """The kind of root disk that it takes."""

    def order(self) -> instance_types.Order:
        """The smallest first, then families that many zones offer."""
        family = self.name.partition("-")[0]
        rank = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
        size = self.cpu + self.memory / 2**30 / 8  # on demand a GiB costs about an eighth of a vCPU
        return self.gpu, size, rank, self.name

    @classmethod
    def listed(cls, said: Any) -> MachineType:
        """From one item of ``machineTypes.list`` (``compute_v1.MachineType``)."""
        family = said.name.partition("-")[0]
        accelerators = list(said.accelerators)
        count = sum(a.guest_accelerator_count for a in accelerators)
        return cls(
            name=said.name,
            cpu=said.guest_cpus,
            memory=said.memory_mb * 2**20,
            gpu=count,
            accelerator=accelerators[0].guest_accelerator_type if accelerators else "",
            architecture="arm64" if said.architecture == "ARM64" else "x86_64",
            disk=disk_of(said.name),
            choosable=(family not in ("f1", "g1", "n1") and not said.is_shared_cpu and "metal" not in said.name)
            and not said.name.endswith("-lssd"),
        )


def disk_of(machine: str) -> str:
    """The kind of root disk that a type which is in no catalogue takes, by its family."""
    hyper = any(machine == family or machine.startswith(f"{family}-") for family in HYPERDISK_ONLY)
    return "hyperdisk-balanced" if hyper else "pd-balanced"


def parts(name: str) -> tuple[str, str, int] | None:
    """(machine type, attached accelerator or "", how many of it); None for what is no type's name."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return found["machine"], found["accelerator"] or "", int(found["count"] or 0)


Catalogue = instance_types.Catalogue[MachineType]


def load(path: Path) -> Catalogue:
    return instance_types.load(MachineType, path)


@functools.cache
def shipped() -> Catalogue:
    return load(SHIPPED)


def of(home: Path) -> Catalogue:
    """The operator's own, if there is one, else the one that ships. Raises Unavailable for one that cannot be read."""
    return instance_types.own_or_shipped(home / OWN, load, shipped, "clouds.gcp.machines.catalogue")


def refreshed(machine_types: Iterable[Any]) -> Catalogue:
    """What a zone's ``machineTypes.list`` says, and N1's attachable GPUs, which no list names with their machines."""
    listed = [MachineType.listed(said) for said in machine_types]
    names = {t.name for t in listed}
    attached = [t for t in shipped().types.values() if (p := parts(t.name)) is not None and p[1] and p[0] in names]
    return Catalogue([*listed, *attached])


def save(catalogue: Catalogue, path: Path) -> None:
    instance_types.save(MachineType, catalogue, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clouds.gcp.machines.catalogue")
    refresh = parser.add_subparsers(required=True).add_parser("refresh", help="ask which machine types there are")
    refresh.add_argument("--project", required=True)
    refresh.add_argument("--zone", action="append", required=True, help="may be repeated")
    refresh.add_argument("--file", type=Path, help=f"default: {OWN} in HELIOSTAT_HOME")
    given = parser.parse_args()
    token = os.environ.get("GOOGLE_OAUTH_ACCESS_TOKEN")
    if not token:
        parser.error("GOOGLE_OAUTH_ACCESS_TOKEN is not set: gcloud auth print-access-token gives one")
    from google.cloud import compute_v1
    from google.oauth2.credentials import Credentials

    client = compute_v1.MachineTypesClient(credentials=Credentials(token=token))  # type: ignore[no-untyped-call]
    found: dict[str, MachineType] = {}
    for zone in given.zone:
        found |= refreshed(client.list(project=given.project, zone=zone)).types
    path = given.file or Path(os.environ.get("HELIOSTAT_HOME", Path.home() / ".heliostat")) / OWN
    save(Catalogue(found.values()), path)
    print(f"{path}: {len(found)} machine types. Restart the API and the workers.")  # noqa: T201


if __name__ == "__main__":
    main()
