"""A cloud: one place that machines come from."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from heliostat.models.common import Model, Result


class Provider(StrEnum):
    LOCAL = "local"
    AWS = "aws"
    GCP = "gcp"
    FAKE = "fake"


class Market(StrEnum):
    ON_DEMAND = "ON_DEMAND"
    SPOT = "SPOT"
    PREFER_SPOT = "PREFER_SPOT"


class Capabilities(Result):
    """What a cloud can do, written down when it is registered, so that the API refuses what can't fit
    without knowing any provider."""

    markets: list[Market] = [Market.ON_DEMAND]
    zones: list[str] = []
    instance_types: list[str] | None = None
    """None: any; else the only ones."""
    max_cpu_per_node: float | None = None
    max_memory_per_node: int | None = None
    """Bytes."""
    max_gpu_per_node: int = 0


class Cloud(Result):
    id: str
    name: str
    provider: Provider
    is_default: bool = False
    capabilities: Capabilities = Field(default_factory=Capabilities)
    created_at: datetime


class AwsSubnet(Model):
    id: str = Field(pattern=r"^subnet-[0-9a-f]{8,17}$")
    zone: str = Field(pattern=r"^[a-z0-9-]{6,40}$")
    """Of that subnet, e.g. ``us-west-2a``: written down, so that no launch has to ask."""


class AwsConfig(Model):
    """A cloud in one region of the customer's AWS account. Holds no secret: the external id is a name that the role's
    trust policy asks for."""

    region: str = Field(pattern=r"^[a-z]{2}(-[a-z]+){1,3}-\d{1,2}$")
    role_arn: str = Field(pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]{1,512}$")
    """What the control plane assumes for every call."""
    external_id: str = Field(min_length=2, max_length=1224, pattern=r"^[\w+=,.@:/-]+$")
    """Ours for the organization; the role's trust policy must ask for it (``sts:ExternalId``)."""
    vpc_id: str = Field(pattern=r"^vpc-[0-9a-f]{8,17}$")
    subnets: list[AwsSubnet] = Field(min_length=1)
    """Where machines go. They need no way in, only one out: to the API and the bucket."""
    security_groups: list[str] = Field(min_length=1, max_length=5)
    """Of machines: all traffic among themselves; from the load balancers' group to the ports of Serve."""
    instance_profile: str = Field(pattern=r"^[\w+=,.@-]{1,128}$")
    """Name of the machines' own instance profile."""
    image: str = Field(
        default="/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64",
        pattern=r"^(ami-[0-9a-f]{8,17}|/[\w./-]{1,1000})$",
    )
    """An AMI's id, or the SSM parameter that names one."""
    instance_type: str = Field(default="m6i.large", pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")
    """Of nodes that ask for nothing in particular."""
    root_volume_gib: int = Field(default=100, ge=8, le=16384)
    """GiB of the root disk: images of Ray with GPU libraries take 10 GiB and more."""
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    bucket_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_.=-]+/)*$")
    """In front of all our keys; ends in ``/``."""
    balancer_subnets: list[str] = []
    """Of services' load balancers, in two zones at least. Empty: the cloud runs no services."""
    balancer_security_groups: list[str] = []
    balancer_internal: bool = False
    """Whether endpoints have private addresses alone."""
    balancer_certificate: str | None = Field(default=None, pattern=r"^arn:aws[a-z-]*:acm:[\w:/-]+$")
    """ARN of a certificate: endpoints are ``https://``. gRPC wants one."""
