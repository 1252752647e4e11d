"""Instance types of EC2: what they have, and which one fits.

``catalogue.csv`` ships with us. It is what DescribeInstanceTypes says, as moto 5.2.5 (Apache-2.0) has recorded it; no
prices. An operator's own, from what regions offer to an account, stands before it; the API and the workers read it
when they start:

    python -m clouds.aws.machines.catalogue refresh --region us-west-2 --region eu-west-1

It uses your own AWS credentials.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from clouds.shapes import is_accelerator, own_or_shipped

SHIPPED = Path(__file__).with_name("catalogue.csv")
OWN = "aws-types.csv"
"""The operator's, in HELIOSTAT_HOME."""
MEMORY_PER_CPU = 4 * 2**30
"""Bytes for each CPU, where nothing is said: the ratio of EC2's general-purpose types."""
FAMILIES = (
    "m6i",
    "c6i",
    "r6i",
    "m7i",
    "c7i",
    "r7i",
    "m6g",
    "c6g",
    "r6g",
    "g4dn",
    "g5",
    "g6",
    "g6e",
    "p4d",
    "p5",
    "p5en",
)
"""These come first, as they are offered in the most regions and zones."""


@dataclass(frozen=True)
class InstanceType:
    name: str
    cpu: int
    """vCPUs."""
    memory: int
    """Bytes."""
    gpu: int
    """Whole ones; a type with a part of one has 0."""
    accelerator: str
    """Of its GPUs, as AWS calls it, e.g. ``T4``, ``H100``; "": none."""
    architecture: str
    """``x86_64`` or ``arm64``."""
    choosable: bool
    """Whether it may be chosen by what it has: on Nitro (all since 2018; AWS calls types that most people
    use "previous generation"), not burstable (their CPUs are lent), not bare metal (slow to boot), with no accelerator
    but whole GPUs."""

    @classmethod
    def described(cls, said: dict[str, Any]) -> InstanceType | None:
        """From one item of DescribeInstanceTypes; None for a Mac."""
        architectures = said["ProcessorInfo"]["SupportedArchitectures"]
        architecture = next((a for a in ("x86_64", "arm64") if a in architectures), None)
        if architecture is None:
            return None
        gpus = said.get("GpuInfo", {}).get("Gpus", [])
        count = sum(g.get("Count", 0) for g in gpus)
        odd = ("FpgaInfo", "NeuronInfo", "InferenceAcceleratorInfo", "MediaAcceleratorInfo")
        return cls(
            name=said["InstanceType"],
            cpu=said["VCpuInfo"]["DefaultVCpus"],
            memory=said["MemoryInfo"]["SizeInMiB"] * 2**20,
            gpu=count,
            accelerator=gpus[0]["Name"] if gpus else "",
            architecture=architecture,
            choosable=said.get("Hypervisor") == "nitro"
            and not (said["BareMetal"] or said["BurstablePerformanceSupported"] or any(said.get(o) for o in odd))
            and "on-demand" in said["SupportedUsageClasses"]
            and (count > 0 or not gpus),
        )


class Catalogue:
    def __init__(self, types: Iterable[InstanceType]) -> None:
        self.types = {t.name: t for t in types}
        choosable = [t for t in self.types.values() if t.choosable]
        self.max_cpu = max((t.cpu for t in choosable), default=0)
        self.max_memory = max((t.memory for t in choosable), default=0)
        self.max_gpu = max((t.gpu for t in choosable), default=0)

    def candidates(
        self,
        cpu: float = 0,
        memory: int | None = None,
        gpu: int = 0,
        accelerator: str = "",
        architecture: str = "x86_64",
    ) -> list[InstanceType]:
        """What has at least that, best first: fewest GPUs; families of ``FAMILIES`` before all others; types with GPUs
        by family (from T4 to H100), others by size.

        Args:
            memory: bytes; None: as much as general-purpose types of so many CPUs have, if there is such a one.
        """
        least = cpu if gpu else max(cpu, 2)  # types with one CPU are offered in few zones
        wanted = memory if memory is not None else 0 if gpu else int(least * MEMORY_PER_CPU)
        fit = [
            t
            for t in self.types.values()
            if t.choosable
            and t.architecture == architecture
            and t.cpu >= least
            and (t.gpu >= gpu if gpu else t.gpu == 0)
            and (not accelerator or is_accelerator(accelerator, t.accelerator))
        ]
        roomy = [t for t in fit if t.memory >= wanted]
        if memory is None and not roomy:
            roomy = fit
        return sorted(roomy, key=_order)


def _order(t: InstanceType) -> tuple[int, bool, int, float, int, str]:
    family = t.name.partition(".")[0]
    known = family in FAMILIES
    rank = FAMILIES.index(family) if known else len(FAMILIES)
    size = t.cpu + t.memory / 2**30 / 8  # on demand a GiB costs about an eighth of a vCPU
    return t.gpu, not known, rank if t.gpu else 0, size, rank, t.name


def load(path: Path) -> Catalogue:
    with path.open(newline="") as f:
        return Catalogue(_row(row) for row in csv.DictReader(f))


@functools.cache
def shipped() -> Catalogue:
    return load(SHIPPED)


def of(home: Path) -> Catalogue:
    """The operator's own, if there is one, else the one that ships. Raises Unavailable for one that cannot be read."""
    return own_or_shipped(home / OWN, load, shipped, "clouds.aws.machines.catalogue")


def refreshed(ec2: Any) -> Catalogue:
    """What the region of this boto3 client offers now; some 10 calls of DescribeInstanceTypes."""
    said = (t for page in ec2.get_paginator("describe_instance_types").paginate() for t in page["InstanceTypes"])
    return Catalogue(found for t in said if (found := InstanceType.described(t)) is not None)


def save(catalogue: Catalogue, path: Path) -> None:
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(InstanceType)], lineterminator="\n")
        writer.writeheader()
        for name in sorted(catalogue.types):
            writer.writerow(asdict(catalogue.types[name]) | {"choosable": int(catalogue.types[name].choosable)})


def _row(row: dict[str, str]) -> InstanceType:
    return InstanceType(
        name=row["name"],
        cpu=int(row["cpu"]),
        memory=int(row["memory"]),
        gpu=int(row["gpu"]),
        accelerator=row["accelerator"],
        architecture=row["architecture"],
        choosable=row["choosable"] == "1",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m clouds.aws.machines.catalogue")
    refresh = parser.add_subparsers(required=True).add_parser("refresh", help="ask AWS which instance types there are")
    refresh.add_argument("--region", action="append", required=True, help="may be repeated")
    refresh.add_argument("--file", type=Path, help=f"default: {OWN} in HELIOSTAT_HOME")
    given = parser.parse_args()
    import boto3

    found: dict[str, InstanceType] = {}
    for region in given.region:
        found |= refreshed(boto3.client("ec2", region_name=region)).types
    path = given.file or Path(os.environ.get("HELIOSTAT_HOME", Path.home() / ".heliostat")) / OWN
    save(Catalogue(found.values()), path)
    print(f"{path}: {len(found)} instance types. Restart the API and the workers.")  # noqa: T201


if __name__ == "__main__":
    main()
