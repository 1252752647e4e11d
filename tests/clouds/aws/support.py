"""AWS for tests: an account in moto, with a network, an image and the role that we assume."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import botocore.session

from clouds.aws.account.session import AwsSession, _loader
from clouds.aws.account.throttle import RateLimiter
from clouds.aws.bucket import AwsBucket
from clouds.aws.machines.ec2 import AwsMachines
from clouds.aws.setup import rights
from heliostat.models.clouds import AwsConfig
from tests.clouds.aws import moto_iam, moto_plus
from tests.clouds.support import OURS, Cloud

REGION = "us-west-2"
EXTERNAL_ID = "heliostat-org-1"
ZONES = ("us-west-2a", "us-west-2b")
_accounts = itertools.count(200_000_000_001)


@dataclass
class Account:
    """A customer's account that nobody else uses."""

    url: str
    id: str
    config: AwsConfig
    _shared: AwsSession | None = None

    @property
    def shared(self) -> AwsSession:
        """One for those that do not look at sessions: clients take longer than what is asked of them."""
        self._shared = self._shared or self.session()
        return self._shared

    def session(self, *, limiter: RateLimiter | None = None, **changes: Any) -> AwsSession:
        source = _session("AKIACONTROLPLANE0000", "secret")
        config = self.config.model_copy(update=changes)
        return AwsSession(config, OURS, endpoint_url=self.url, source=source, limiter=limiter or RateLimiter())

    def machines(self, session: AwsSession | None = None, installation_id: str = OURS, **changes: Any) -> AwsMachines:
        config = self.config.model_copy(update=changes)
        return AwsMachines(config, session or self.shared, installation_id)

    def bucket(self, prefix: str = "", **changes: Any) -> AwsBucket:
        """With the bucket made."""
        config = self.config.model_copy(update=changes)
        s3 = moto_plus.s3_backends[self.id]["aws"]
        if config.bucket not in s3.buckets:
            s3.create_bucket(config.bucket, REGION)
        return AwsBucket(config, self.shared, prefix)

    def clear(self) -> None:
        """Forgets machines, load balancers and objects."""
        ec2, elb = (b[self.id][REGION] for b in (moto_plus.ec2_backends, moto_plus.elbv2_backends))
        ec2.reservations.clear()
        ec2.volumes.clear()
        ec2.enis.clear()
        ec2.__dict__.pop("_by_token", None)
        ec2.__dict__.pop("_made_by_token", None)
        elb.load_balancers.clear()
        elb.target_groups.clear()
        if moto_plus.s3_backends[self.id]["aws"].buckets.pop(self.config.bucket, None) is not None:
            moto_plus.s3_backends.bucket_accounts.pop(self.config.bucket)

    def client(self, service: str) -> Any:
        """Of the customer's own administrator, as ours would be in the way of tests of it."""
        return _admin(self.url, self.id, service)


def _session(*credentials: str) -> botocore.session.Session:
    session = botocore.session.Session()
    session.register_component("data_loader", _loader())
    session.set_credentials(*credentials)
    return session


@functools.cache
def _admin(url: str, account: str, service: str) -> Any:
    sts = _session("AKIAADMIN00000000000", "secret").create_client("sts", REGION, endpoint_url=url)
    got = sts.assume_role(RoleArn=f"arn:aws:iam::{account}:role/admin", RoleSessionName="admin")["Credentials"]
    session = _session(got["AccessKeyId"], got["SecretAccessKey"], got["SessionToken"])
    return session.create_client(service, REGION, endpoint_url=url)


def make_account(url: str, networks: tuple[str, str] = ("10.0.0.0/20", "10.0.16.0/20")) -> Account:
    """``networks``: of its two subnets, in one /16."""
    account = str(next(_accounts))
    trust = lambda condition: json.dumps(  # noqa: E731
        {"Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": "*", "Condition": condition}]}
    )
    iam = moto_iam.iam_backends[account]["aws"]
    for name, condition in (("admin", {}), ("heliostat", {"StringEquals": {"sts:ExternalId": EXTERNAL_ID}})):
        iam.create_role(name, trust(condition), "/", None, "", [], 3600)
    node_role = iam.create_role("heliostat-node", trust({}), "/", None, "", [], 3600)
    iam.create_instance_profile("heliostat-node", "/", ["heliostat-node"], [])
    # In process, for it is made for each test: over HTTP it would take longer than the tests.
    ec2 = moto_plus.ec2_backends[account][REGION]
    vpc = ec2.create_vpc(".".join([*networks[0].split(".")[:2], "0.0/16"])).id
    subnets = [ec2.create_subnet(vpc, n, availability_zone=z).id for n, z in zip(networks, ZONES, strict=True)]
    # A way out to everywhere: public subnets, whose machines get public addresses.
    gateway = ec2.create_internet_gateway().id
    ec2.attach_internet_gateway(gateway, vpc)
    (table,) = [t for t in ec2.route_tables.values() if t.vpc_id == vpc]
    ec2.create_route(table.id, "0.0.0.0/0", gateway_id=gateway)
    for subnet in subnets:
        ec2.modify_subnet_attribute(subnet, "map_public_ip_on_launch", "true")
    group = ec2.create_security_group("nodes", "nodes", vpc).id
    ec2.authorize_security_group_ingress(group, "-1", "-1", "-1", [], source_groups=[{"GroupId": group}])
    ami = ec2.register_image("heliostat")
    ami.architecture, ami.root_device_name = "x86_64", "/dev/xvda"  # moto drops what RegisterImage says of these
    config = AwsConfig.model_validate(
        {
            "region": REGION,
            "role_arn": f"arn:aws:iam::{account}:role/heliostat",
            "external_id": EXTERNAL_ID,
            "vpc_id": vpc,
            "subnets": [{"id": s, "zone": z} for s, z in zip(subnets, ZONES, strict=True)],
            "security_groups": [group],
            "instance_profile": "heliostat-node",
            "image": ami.id,
            "bucket": f"heliostat-{account}",
            "balancer_subnets": subnets,
            "balancer_security_groups": [group],
        }
    )
    policy = rights.role_policy(config, OURS, node_role.arn)
    iam.put_role_policy("heliostat", "heliostat", json.dumps(policy))
    return Account(url, account, config)


@contextmanager
def private_subnets(account: Account) -> Iterator[None]:
    """Their machines get no public addresses, and have a way out all the same: a NAT gateway's."""
    ec2 = moto_plus.ec2_backends[account.id][REGION]
    for subnet in account.config.subnets:
        ec2.modify_subnet_attribute(subnet.id, "map_public_ip_on_launch", "false")
    try:
        yield
    finally:
        for subnet in account.config.subnets:
            ec2.modify_subnet_attribute(subnet.id, "map_public_ip_on_launch", "true")


@contextmanager
def aws_cloud(folder: Path, account: Account) -> Iterator[Cloud]:
    """For the contract's suite: each machine that boots writes its line to ``boots``."""
    boots = folder / "boots"

    def boot(instance: Any) -> None:
        with boots.open("a") as f:
            f.write("boot\n")

    moto_plus.KNOBS.after_boot = boot
    try:
        yield Cloud(account.machines(), boots, keeps_the_ended=False)
    finally:
        moto_plus.KNOBS.after_boot = None
        moto_plus.KNOBS.faults.clear()
