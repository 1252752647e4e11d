"""A cloud: where clusters run."""

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
    """What a cloud supports, stored at registration: the API checks requests against it without provider code."""

    markets: list[Market] = [Market.ON_DEMAND]
    zones: list[str] = []
    instance_types: list[str] | None = None
    """Allowed instance types; None: any."""
    max_cpu_per_node: float | None = None
    max_memory_per_node: int | None = None
    """Bytes."""
    max_gpu_per_node: int = 0
    keeps: bool = False
    """Whether heads can have a retained volume and a fixed address."""


class AwsSubnet(Model):
    id: str = Field(pattern=r"^subnet-[0-9a-f]{8,17}$")
    """Id of the subnet."""
    zone: str = Field(pattern=r"^[a-z0-9-]{6,40}$")
    """Zone of the subnet, e.g. ``us-west-2a``. It is part of the config, so no launch has to look it up."""


class MachineRuntime(Model):
    """The environment of Ray on a cloud's machines: a container image, or a Python interpreter. Default: ``python3`` of
    the machine image if it has Ray, else a virtual environment with this release's Ray, created at boot."""

    container_image: str | None = Field(default=None, pattern=r"^[a-z0-9][A-Za-z0-9._:/@-]{0,400}$")
    """Container image, e.g. ``rayproject/ray:2.60.0-py311-gpu``. Docker runs it on the machine's network with its GPUs,
    and is installed if it is missing. The image needs Python 3.11 or later and this release's Ray."""
    python: str | None = Field(default=None, pattern=r"^/[A-Za-z0-9._+/-]{1,200}$")
    """Path of a Python interpreter with Ray, in the machine image or in ``container_image``."""
    pip_index_url: str | None = Field(default=None, pattern=r"^https?://[^\s@]{1,400}$")
    """Package index for Ray and for the requirements of jobs. Default: PyPI. It is part of the user-data, so it must
    not contain a password."""

    @property
    def made_at_boot(self) -> bool:
        """Whether a machine may have to download gigabytes before it registers. Without a named interpreter it is
        unknown whether its image has Ray."""
        return self.container_image is not None or self.python is None


class AwsConfig(MachineRuntime):
    """A cloud in one region of an AWS account. It contains no secret: the external id is a name that the role's trust
    policy requires."""

    region: str = Field(pattern=r"^[a-z]{2}(-[a-z]+){1,3}-\d{1,2}$")
    """AWS region, e.g. ``us-west-2``."""
    role_arn: str = Field(pattern=r"^arn:aws[a-z-]*:iam::\d{12}:role/[A-Za-z0-9_+=,.@/-]{1,512}$")
    """IAM role that the control plane assumes for every call."""
    external_id: str = Field(min_length=2, max_length=1224, pattern=r"^[A-Za-z0-9_+=,.@:/-]+$")
    """External id of the organization; the role's trust policy must require it (``sts:ExternalId``)."""
    vpc_id: str = Field(pattern=r"^vpc-[0-9a-f]{8,17}$")
    """VPC of the machines."""
    subnets: list[AwsSubnet] = Field(min_length=1)
    """Subnets of the machines. They need no inbound access, only outbound access to the API and the bucket."""
    security_groups: list[str] = Field(min_length=1, max_length=5)
    """Security groups of the machines. They allow all traffic among the machines, and traffic from the load balancers'
    group to Serve's ports."""
    instance_profile: str = Field(pattern=r"^[A-Za-z0-9_+=,.@-]{1,128}$")
    """Name of the instance profile of the machines."""
    image: str = Field(
        default="/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64",
        pattern=r"^(ami-[0-9a-f]{8,17}|/[A-Za-z0-9_./-]{1,1000})$",
    )
    """Machine image for x86_64: an AMI id, or an SSM parameter that contains one."""
    gpu_image: str | None = Field(default=None, pattern=r"^(ami-[0-9a-f]{8,17}|/[A-Za-z0-9_./-]{1,1000})$")
    """Machine image for machines with GPUs; it needs NVIDIA's driver. Default: ``image`` if you set it, else Amazon's
    Deep Learning base image."""
    arm_image: str = Field(
        default="/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64",
        pattern=r"^(ami-[0-9a-f]{8,17}|/[A-Za-z0-9_./-]{1,1000})$",
    )
    """Machine image for machines with ARM CPUs."""
    instance_type: str = Field(default="m6i.large", pattern=r"^[a-z0-9-]+\.[a-z0-9-]+$")
    """Instance type of nodes that request none."""
    root_volume_gib: int = Field(default=100, ge=8, le=16384)
    """Size of the root disk in GiB. Images of Ray with GPU libraries take 10 GiB and more."""
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
    """S3 bucket for code and logs."""
    bucket_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_.=-]+/)*$")
    """Prefix of all keys in the bucket; ends in ``/``."""
    balancer_subnets: list[str] = []
    """Subnets of the services' load balancers, in at least two zones. Empty: the cloud runs no services."""
    balancer_security_groups: list[str] = []
    """Security groups of the load balancers."""
    balancer_internal: bool = False
    """Whether endpoints have private addresses only."""
    balancer_certificate: str | None = Field(default=None, pattern=r"^arn:aws[a-z-]*:acm:[A-Za-z0-9_:/-]+$")
    """ARN of a certificate; endpoints then use ``https://``. gRPC requires one."""


GcpName = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
GcpPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,400}$")]
"""Name of a resource, or its path from ``projects/`` on."""
GcpEmail = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{4,40})@[a-z0-9.:-]{1,80}\.gserviceaccount\.com$")]


class GcpConfig(MachineRuntime):
    """A cloud in one region of a Google Cloud project. It contains names only: no key, no token, no credentials
    file."""

    project: str = Field(pattern=r"^([a-z][-a-z0-9.]*[a-z0-9]:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$")
    """Id of the Google Cloud project."""
    region: str = Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")
    """Region, e.g. ``us-central1``."""
    zones: list[GcpName] = Field(min_length=1)
    """Zones of the region, tried in this order by requests that name none."""
    workload_identity_provider: str = Field(
        pattern=r"^projects/\d+/locations/global/workloadIdentityPools/[a-z0-9-]{4,32}/providers/[a-z0-9-]{4,32}$"
    )
    """Workload identity provider that trusts the control plane's tokens, with the project's *number*."""
    service_account: GcpEmail
    """Service account that the control plane impersonates for every call."""
    node_service_account: GcpEmail | None = None
    """Service account of the machines. Default: none, so they have no permissions in the project."""
    network: GcpPath = "default"
    """VPC network of the machines."""
    subnetwork: GcpPath = "default"
    """Name of the subnetwork, or ``projects/<host project>/regions/<region>/subnetworks/<name>`` of a shared VPC."""
    network_tags: list[GcpName] = []
    """Network tags of the machines, for firewall rules."""
    external_ip: bool = False
    """Whether machines have public addresses. Without them, machines reach the API by Cloud NAT or a private route."""
    image: GcpPath = "projects/debian-cloud/global/images/family/debian-12"
    """Machine image or image family for x86_64."""
    gpu_image: GcpPath | None = None
    """Machine image for machines with GPUs; it needs NVIDIA's driver. Default: ``image``."""
    arm_image: GcpPath = "projects/debian-cloud/global/images/family/debian-12-arm64"
    """Machine image for machines with ARM CPUs."""
    instance_type: str = Field(default="e2-standard-4", pattern=r"^[a-z0-9-]+(/[a-z0-9-]+:\d{1,2})?$")
    """Instance type of nodes that request none."""
    instance_types: list[str] | None = None
    """Allowed machine types. Default: any."""
    root_volume_gib: int = Field(default=100, ge=10, le=65536)
    """Size of the root disk in GiB."""
    root_volume_type: GcpName | None = None
    """Type of the root disk. Default: ``pd-balanced``, or ``hyperdisk-balanced`` where the machine type requires it."""
    kms_key: GcpPath | None = None
    """KMS key that encrypts the disks. Default: Google's own keys."""
    max_run_hours: int | None = Field(default=None, ge=1, le=24 * 120)
    """Hours after which the cloud itself deletes a machine. Default: never."""
    bucket: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$")
    """Cloud Storage bucket for code and logs."""
    bucket_prefix: str = Field(default="", pattern=r"^([A-Za-z0-9_.=-]+/)*$")
    """Prefix of all keys in the bucket; ends in ``/``."""
    balancer_internal: bool = False
    """Whether endpoints have private addresses only."""
    balancer_certificates: list[GcpPath] = []
    """Regional SSL certificates (``projects/…/regions/…/sslCertificates/…``); endpoints then use ``https://``. gRPC
    requires one."""

    @model_validator(mode="after")
    def _zones_are_of_the_region(self) -> GcpConfig:
        for zone in self.zones:
            if zone.rpartition("-")[0] != self.region:
                raise ValueError(f"zones: {zone} is not a zone of the region {self.region}")
        return self


class Cloud(Result):
    id: str
    name: str
    provider: Provider
    is_default: bool = False
    capabilities: Capabilities = Field(default_factory=Capabilities)
    config: AwsConfig | GcpConfig | None = None
    """The registered config; None: the local cloud on the control plane's machine."""
    created_at: datetime


class AwsCloudCreate(Model):
    name: Name
    """Name of the cloud, unique in the organization."""
    provider: Literal[Provider.AWS]
    """``aws``."""
    config: AwsConfig
    """Region, network, images and bucket of the cloud."""
    is_default: bool = False
    """Whether requests that name no cloud use this one."""


class GcpCloudCreate(Model):
    name: Name
    """Name of the cloud, unique in the organization."""
    provider: Literal[Provider.GCP]
    """``gcp``."""
    config: GcpConfig
    """Project, region, network, images and bucket of the cloud."""
    is_default: bool = False
    """Whether requests that name no cloud use this one."""


CloudCreate = Annotated[AwsCloudCreate | GcpCloudCreate, Field(discriminator="provider")]
"""What ``cloud register -f cloud.yaml`` sends."""


class Trust(Result):
    """The identities that a customer's account must trust, for templates. It contains no secret."""

    installation_id: str
    """Value of the owner tag; the templates' policies are scoped to it."""
    external_id: str
    """AWS: external id of the organization. A role whose trust policy requires it works for this organization only."""
    aws_principal: str | None = None
    """ARN of the identity that assumes the role; None: the control plane has no AWS credentials."""
    aws_principal_whole: bool = True
    """False: it is a role whose path AWS did not return; a policy must name a role with its path."""
    issuer: str
    """GCP: issuer of the tokens that the workload identity pool trusts; Google must reach it over https."""
    subject: str
    """GCP: ``sub`` of those tokens, unique to the organization."""


class CheckState(StrEnum):
    OK = "ok"
    FAILED = "failed"
    WARNING = "warning"
    """It works, but needs attention."""
    SKIPPED = "skipped"
    """It depends on a check that failed, or can't run from here; ``detail`` has the reason."""


class Check(Result):
    """One check of ``cloud verify``."""

    name: str
    """E.g. ``right ec2:RunInstances``, ``subnet subnet-0abc``, ``bucket``."""
    state: CheckState
    detail: str = ""
    """Result of the check."""
    remedy: str = ""
    """What to do; for a missing permission, the policy line to add."""


class Verification(Result):
    cloud_id: str
    ok: bool
    """Whether no check failed."""
    checks: list[Check]


class CloudSetup(Model):
    """Request for a template of the resources in a customer's account, which a person reviews and applies."""

    provider: Literal[Provider.AWS, Provider.GCP]
    region: str = Field(pattern=r"^[a-z0-9-]{4,40}$")
    name: Name
    """Name of the cloud and of the template's resources."""
    project: str | None = Field(default=None, pattern=r"^([a-z][-a-z0-9.]*[a-z0-9]:)?[a-z][-a-z0-9]{4,28}[a-z0-9]$")
    """GCP: the project's id."""

    @model_validator(mode="after")
    def _project_is_of_gcp(self) -> CloudSetup:
        if (self.provider is Provider.GCP) != (self.project is not None):
            needed = (
                "required for gcp"
                if self.provider is Provider.GCP
                else "for gcp only; the template defines the AWS account"
            )
            raise ValueError(f"project is {needed}")
        return self


class SetupFiles(Result):
    files: dict[str, str]
    """Content by file name. It contains no secret."""
    next_step: str
    """What to do with the files, as text with commands."""
