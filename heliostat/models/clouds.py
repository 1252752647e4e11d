"""A cloud: one place that machines come from."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, model_validator

from heliostat.models.common import Model, Name, Result


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
    keeps: bool = False
    """Whether a head may hand a disk and its private address on to the next one."""


class AwsSubnet(Model):
    id: str = Field(pattern=r"^subnet-[0-9a-f]{8,17}$")
    zone: str = Field(pattern=r"^[a-z0-9-]{6,40}$")
    """Of that subnet, e.g. ``us-west-2a``: written down, so that no launch has to ask."""


class MachineRuntime(Model):
    """What Ray on a cloud's machines runs in: an image with docker, else a Python. Unset: the ``python3`` of the
    machine's image if it has Ray, else a virtual environment that is made at boot with this release's Ray."""

    container_image: str | None = Field(default=None, pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]{0,400}$")
    """E.g. ``rayproject/ray:2.60.0-py311-gpu``: run by docker, which is installed where it is missing, on the machine's
    own network and with its GPUs. It needs Python 3.11 or later and this release's Ray."""
    python: str | None = Field(default=None, pattern=r"^/[A-Za-z0-9._+/-]{1,200}$")
    """Path of the interpreter that has Ray, in the machine's image or in ``container_image``."""
    pip_index_url: str | None = Field(default=None, pattern=r"^https?://[^\s@]{1,400}$")
    """Where machines get Ray and jobs their requirements; None: PyPI. It stands in user-data, so it may hold no
    password."""

    @property
    def made_at_boot(self) -> bool:
        """Whether a machine may have to fetch gigabytes before it can call us. Whether its image has Ray already, where
        nothing is named, is not known to us."""
        return self.container_image is not None or self.python is None


class AwsConfig(MachineRuntime):
    """A cloud in one region of the customer's AWS account. Holds no secret: the external id is a name that the role's
    trust policy asks for."""

    region: str = Field(pattern=r"^[a-z]{2}(-[a-z]+){1,3}-\d{1,2}$")
    role_arn: str = Field(pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/[A-Za-z0-9_+=,.@/-]{1,512}$")
    """What the control plane assumes for every call."""
    external_id: str = Field(min_length=2, max_length=1224, pattern=r"^[A-Za-z0-9_+=,.@:/-]+$")
    """Ours for the organization; the role's trust policy must ask for it (``sts:ExternalId``)."""
    vpc_id: str = Field(pattern=r"^vpc-[0-9a-f]{8,17}$")
    subnets: list[AwsSubnet] = Field(min_length=1)
    """Where machines go. They need no way in, only one out: to the API and the bucket."""
    security_groups: list[str] = Field(min_length=1, max_length=5)
    """Of machines: all traffic among themselves; from the load balancers' group to the ports of Serve."""
    instance_profile: str = Field(pattern=r"^[A-Za-z0-9_+=,.@-]{1,128}$")
    """Name of the machines' own instance profile."""
    image: str = Field(
        default="/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64",
        pattern=r"^(ami-[0-9a-f]{8,17}|/[A-Za-z0-9_./-]{1,1000})$",
    )
    """An AMI's id, or the SSM parameter that names one; for x86_64."""
    gpu_image: str | None = Field(default=None, pattern=r"^(ami-[0-9a-f]{8,17}|/[A-Za-z0-9_./-]{1,1000})$")
    """Of machines with GPUs, with NVIDIA's driver on it. None: ``image`` if that is one of your own, else Amazon's Deep
    Learning base image."""
    arm_image: str = Field(
        default="/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64",
        pattern=r"^(ami-[0-9a-f]{8,17}|/[A-Za-z0-9_./-]{1,1000})$",
    )
    """Of machines with ARM CPUs."""
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
    balancer_certificate: str | None = Field(default=None, pattern=r"^arn:aws[a-z-]*:acm:[A-Za-z0-9_:/-]+$")
    """ARN of a certificate: endpoints are ``https://``. gRPC wants one."""


GcpName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
GcpPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,400}$")]
"""A resource's name, or its path from ``projects/`` on."""
GcpEmail = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{4,40})@[a-z0-9.:-]{1,80}\.gserviceaccount\.com$")]


class GcpConfig(MachineRuntime):
    """A cloud in one region of the customer's Google Cloud project. Names only: no key, no token, no credential
    file."""

    project: str = Field(pattern=r"^([a-z][-a-z0-9.]*[a-z0-9]:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$")
    region: str = Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")
    zones: list[GcpName] = Field(min_length=1)
    """Of the region, tried in this order by a request that names none."""
    workload_identity_provider: str = Field(
        pattern=r"^projects/\d+/locations/global/workloadIdentityPools/[a-z0-9-]{4,32}/providers/[a-z0-9-]{4,32}$"
    )
    """The provider that trusts our tokens, by the project's *number*."""
    service_account: GcpEmail
    """The account that we act as for every call."""
    node_service_account: GcpEmail | None = None
    """The machines' own; None: they have none, and no right in the project."""
    network: GcpPath = "default"
    subnetwork: GcpPath = "default"
    """Its name in the region, or ``projects/<host project>/regions/<region>/subnetworks/<name>`` of a shared VPC."""
    network_tags: list[GcpName] = []
    """By which the network's firewall rules know our machines."""
    external_ip: bool = False
    """Whether machines have public addresses. Without, they reach us by Cloud NAT or a private route."""
    image: GcpPath = "projects/debian-cloud/global/images/family/debian-12"
    gpu_image: GcpPath | None = None
    """Of machines with GPUs, with NVIDIA's driver on it; None: ``image``."""
    arm_image: GcpPath = "projects/debian-cloud/global/images/family/debian-12-arm64"
    """Of machines with ARM CPUs."""
    instance_type: str = Field(default="e2-standard-4", pattern=r"^[a-z0-9-]+(/[a-z0-9-]+:\d{1,2})?$")
    """Of nodes that ask for nothing in particular."""
    instance_types: list[str] | None = None
    """The only ones that may be asked for; None: any."""
    root_volume_gib: int = Field(default=100, ge=10, le=65536)
    root_volume_type: GcpName | None = None
    """None: ``pd-balanced``, or ``hyperdisk-balanced`` where the machine type takes no other."""
    kms_key: GcpPath | None = None
    """Of the disks, which are encrypted in any case; None: Google's own keys."""
    max_run_hours: int | None = Field(default=None, ge=1, le=24 * 120)
    """The cloud itself deletes every machine after so long; None: never."""
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$")
    bucket_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_.=-]+/)*$")
    """In front of all our keys; ends in ``/``."""
    balancer_internal: bool = False
    """Whether endpoints have private addresses alone."""
    balancer_certificates: list[GcpPath] = []
    """Regional SSL certificates (``projects/…/regions/…/sslCertificates/…``): endpoints are ``https://``. gRPC wants
    one."""

    @model_validator(mode="after")
    def _zones_are_of_the_region(self) -> GcpConfig:
        for zone in self.zones:
            if zone.rpartition("-")[0] != self.region:
                raise ValueError(f"zones: {zone} is no zone of the region {self.region}")
        return self


class Cloud(Result):
    id: str
    name: str
    provider: Provider
    is_default: bool = False
    capabilities: Capabilities = Field(default_factory=Capabilities)
    config: AwsConfig | GcpConfig | None = None
    """As registered; None: the cloud of the control plane's own machine."""
    created_at: datetime


class AwsCloudCreate(Model):
    name: Name
    provider: Literal[Provider.AWS]
    config: AwsConfig
    is_default: bool = False


class GcpCloudCreate(Model):
    name: Name
    provider: Literal[Provider.GCP]
    config: GcpConfig
    is_default: bool = False


CloudCreate = Annotated[AwsCloudCreate | GcpCloudCreate, Field(discriminator="provider")]
"""What ``cloud register -f cloud.yaml`` sends."""


class Trust(Result):
    """What a customer's account must trust, and by which name: for templates. No secret is in it."""

    installation_id: str
    """Value of the owner tag, to which the templates' policies are scoped."""
    external_id: str
    """AWS: the organization's own. A role whose trust policy asks for it can be assumed for that organization alone."""
    aws_principal: str | None = None
    """ARN of the identity that assumes the role; None: the control plane has no credentials of AWS."""
    aws_principal_whole: bool = True
    """False: it is a role, and AWS did not tell us its path, if it has one: no policy may name a role without it."""
    issuer: str
    """GCP: whose tokens the workload identity pool trusts; it must be reachable by Google over https."""
    subject: str
    """GCP: ``sub`` of those tokens, the organization's own."""


class CheckState(StrEnum):
    OK = "ok"
    FAILED = "failed"
    WARNING = "warning"
    """It works, but somebody should look."""
    SKIPPED = "skipped"
    """Another one that failed stands before it, or it can't be looked at from here; ``detail`` says which."""


class Check(Result):
    """One line of ``cloud verify``'s list."""

    name: str
    """E.g. ``right ec2:RunInstances``, ``subnet subnet-0abc``, ``bucket``."""
    state: CheckState
    detail: str = ""
    """What was found."""
    remedy: str = ""
    """What to do; of a missing right the policy line to add."""


class Verification(Result):
    cloud_id: str
    ok: bool
    """No check has failed."""
    checks: list[Check]


class CloudSetup(Model):
    """What is to be made in the customer's account, as a template that a person reads and applies."""

    provider: Literal[Provider.AWS, Provider.GCP]
    region: str = Field(pattern=r"^[a-z0-9-]{4,40}$")
    name: Name
    """What the cloud will be called; the template's resources too."""
    project: str | None = Field(default=None, pattern=r"^([a-z][-a-z0-9.]*[a-z0-9]:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$")
    """GCP: the project's id."""

    @model_validator(mode="after")
    def _project_is_of_gcp(self) -> CloudSetup:
        if (self.provider is Provider.GCP) != (self.project is not None):
            needed = (
                "needed for gcp" if self.provider is Provider.GCP else "of gcp alone; AWS's account is the template's"
            )
            raise ValueError(f"project: it is {needed}")
        return self


class SetupFiles(Result):
    files: dict[str, str]
    """By file name. No secret is in them."""
    next_step: str
    """What to do with them, in words and commands."""
