"""Instance types of EC2: their size, and which one fits a request.

``catalogue.csv`` ships with us. It is what DescribeInstanceTypes says, as moto 5.2.5 (Apache-2.0) has recorded it; no
prices. An operator's own, from what regions offer to an account, stands before it; the API and the workers read it
when they start:

    python -m clouds.aws.machines.catalogue refresh --region us-west-2 --region eu-west-1

It uses your own AWS credentials.
"""

from __future__ import annotations

import argparse
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clouds import instance_types

if TYPE_CHECKING:
    from types_boto3_ec2 import EC2Client
    from types_boto3_ec2.type_defs import InstanceTypeInfoTypeDef

SHIPPED = Path(__file__).with_name("catalogue.csv")
OWN = "aws-types.csv"
"""The operator's, in HELIOSTAT_HOME."""
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
class InstanceType(instance_types.InstanceType):
    def order(self) -> instance_types.Order:
        """Families of ``FAMILIES`` first; types with GPUs by family (from T4 to H100), others by size."""
        family = self.name.partition(".")[0]
        known = family in FAMILIES
        rank = FAMILIES.index(family) if known else len(FAMILIES)
        size = self.cpu + self.memory / 2**30 / 8  # on demand a GiB costs about an eighth of a vCPU
        return self.gpu, not known, rank if self.gpu else 0, size, rank, self.name

    @classmethod
    def described(cls, said: InstanceTypeInfoTypeDef) -> InstanceType | None:
        """From one item of DescribeInstanceTypes; None for a Mac.

        Choosable are types on Nitro (all since 2018; AWS calls types that most people use "previous generation") that
        are not burstable (their CPUs are lent), not bare metal (slow to boot), with no accelerator but whole GPUs.
        """
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


Catalogue = instance_types.Catalogue[InstanceType]


def load(path: Path) -> Catalogue:
    return instance_types.load(InstanceType, path)


@functools.cache
def shipped() -> Catalogue:
    return load(SHIPPED)


def of(home: Path) -> Catalogue:
    """The operator's own, if there is one, else the one that ships. Raises Unavailable for one that cannot be read."""
    return instance_types.own_or_shipped(home / OWN, load, shipped, "clouds.aws.machines.catalogue")


def refreshed(ec2: EC2Client) -> Catalogue:
    """What the region of this boto3 client offers now; some 10 calls of DescribeInstanceTypes."""
    said = (t for page in ec2.get_paginator("describe_instance_types").paginate() for t in page["InstanceTypes"])
    return Catalogue(found for t in said if (found := InstanceType.described(t)) is not None)


def save(catalogue: Catalogue, path: Path) -> None:
    instance_types.save(InstanceType, catalogue, path)


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
