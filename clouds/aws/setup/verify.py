"""``cloud verify`` for AWS: every right, network rule, image and bucket that a cluster would want, looked at before one
is launched.

Only one object is made, under ``heliostat-verify/`` in the cloud's prefix, and deleted again. EC2 is asked by
``DryRun``, which checks all rights of a launch and launches nothing. What cannot be tried so is told by
``iam:SimulatePrincipalPolicy``: a dry run of TerminateInstances on a machine that is not there says nothing about a
right that is scoped to a tag.
"""

from __future__ import annotations

import difflib
import functools
import json
import uuid
from collections.abc import Callable
from datetime import datetime

import botocore.session

from clouds.aws.account.errors import BotoCoreError, ClientError, classify, code_of, translated
from clouds.aws.account.session import AwsSession
from clouds.aws.machines import catalogue
from clouds.aws.machines.images import Image, Images, image_for
from clouds.aws.setup import rights, verify_bucket, verify_network, verify_rights
from clouds.aws.setup.verify_rights import add_to_role
from clouds.checklist import Checklist
from clouds.contract.errors import Denied
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig, Check
from heliostat.models.common import utcnow

EXPIRES_SOON_DAYS = 30
_OTHERS = (("arm64", False), ("x86_64", True))
"""Architectures, and whether with GPUs: their images may differ."""


def checks(
    session: AwsSession,
    config: AwsConfig,
    *,
    installation_id: str,
    api_url: str,
    now: Callable[[], datetime] = utcnow,
) -> list[Check]:
    """What was found, one line for each right, network rule and resource. Raises nothing for what it finds.

    Args:
        session: into ``config``'s account and region.
        installation_id: the owner tag's value, to which rights are scoped.
        api_url: what machines will call.
        now: this host's clock.
    """
    node_role = [f"arn:{_partition(config)}:iam::{session.account}:role/{config.instance_profile}"]

    def granting(e: Denied) -> str:
        lines = rights.granting(_policy(config, installation_id, node_role[-1]), str(e.details.get("action")))
        return add_to_role(lines) if lines else e.remedy

    found = Checklist(granting)
    found.api(api_url)
    if not _role(found, session, config, now):
        found.behind("role", "rights", "bucket", "subnets", "security groups", "image", "launch")
        return found.checks
    node_role += _instance_profile(found, session, config)
    policy = _policy(config, installation_id, node_role[-1])
    verify_rights.looked_at(found, session, config, policy)
    verify_bucket.looked_at(found, session, config)
    verify_network.looked_at(found, session, config, api_url)
    image = _images(found, session, config)
    _instance_type(found, session, config, image)
    verify_rights.launches(found, session, config, installation_id, image)
    if config.balancer_certificate is not None:
        _certificate(found, session, config, config.balancer_certificate, now)
    return found.checks


def _policy(config: AwsConfig, installation_id: str, node_role: str) -> rights.Policy:
    return rights.role_policy(config, installation_id, node_role)


def _partition(config: AwsConfig) -> str:
    return config.role_arn.split(":")[1]


# -- who we are


def _role(found: Checklist, session: AwsSession, config: AwsConfig, now: Callable[[], datetime]) -> bool:
    """Assumed as configured, and in no other way. Tells the region and the clock by the way."""
    error: CloudError | None = None
    try:
        headers = session.assume(config.external_id)["ResponseMetadata"]["HTTPHeaders"]
    except ClientError as e:
        headers = e.response["ResponseMetadata"].get("HTTPHeaders", {})
        error = translated(e, "sts", "AssumeRole", config.role_arn, config.role_arn)
    except BotoCoreError as e:
        headers, error = {}, translated(e, "sts", "AssumeRole", config.role_arn, config.role_arn)
    _region(found, config, answered=bool(headers))
    if "date" in headers:
        found.clock("clock", headers["date"], now())
    if error is not None:
        found.fail("role", error.message, error.remedy)
        return False
    found.ok("role", f"{config.role_arn} is assumed under external id {config.external_id}.")
    _only_with_the_external_id(found, session, config)
    return True


def _only_with_the_external_id(found: Checklist, session: AwsSession, config: AwsConfig) -> None:
    """A role that we may assume without one could be named by anybody who may register clouds here: the confused
    deputy (https://docs.aws.amazon.com/IAM/latest/UserGuide/confused-deputy.html)."""
    name = "external id"
    condition = json.dumps({"StringEquals": {"sts:ExternalId": config.external_id}})
    for other, words in ((None, "without any external id"), (f"not-{uuid.uuid4()}", "under any external id")):
        try:
            session.assume(other)
        except ClientError as e:
            if classify(code_of(e)) is not Denied:
                found.skip(name, f"AWS did not say whether the role can be assumed {words} ({code_of(e)}).")
                return
        except BotoCoreError as e:
            found.skip(name, f"AWS did not say whether the role can be assumed {words}: {e}")
            return
        else:
            found.fail(
                name,
                f"The role can be assumed {words}: whoever may register a cloud here, and knows its ARN, acts in "
                "this account (the confused deputy).",
                f'Add to the statement of the role\'s trust policy: "Condition": {condition}',
            )
            return
    found.ok(name, "The role is refused without it, and under another one.")


@functools.cache
def _regions(partition: str) -> list[str]:
    names: list[str] = botocore.session.Session().get_available_regions("ec2", partition)
    return names


def _region(found: Checklist, config: AwsConfig, *, answered: bool) -> None:
    known = _regions(_partition(config))
    if config.region in known:
        found.ok("region", config.region)
        return
    near = difflib.get_close_matches(config.region, known, 1)
    said = f"No region {config.region} is known in partition {_partition(config)}."
    remedy = f"Is {near[0]} meant?" if near else f"It must be one of {', '.join(known)}."
    if answered:
        found.warn("region", f"{said} Something answers there.", f"{remedy} If the region is new, update boto3.")
    else:
        found.fail("region", said, remedy)


def _instance_profile(found: Checklist, session: AwsSession, config: AwsConfig) -> list[str]:
    """ARN of the role in it, if S3 or STS returns it."""
    name = "instance profile"

    def ask() -> list[str]:
        answer = session.call(
            "iam", "GetInstanceProfile", config.instance_profile, InstanceProfileName=config.instance_profile
        )
        return [role["Arn"] for role in answer["InstanceProfile"]["Roles"]]

    roles = found.ask(name, ask, needed=False)
    if roles == []:
        found.fail(name, f"{config.instance_profile} has no role.", "Put the machines' role in it.")
    elif roles:
        found.ok(name, f"{config.instance_profile} with role {roles[0].rpartition('/')[2]}.")
    return roles or []


# -- what is used


def _images(found: Checklist, session: AwsSession, config: AwsConfig) -> Image | None:
    """The one that a node boots which asks for nothing in particular; those of other machines are only warned of."""
    images, types = Images(session), catalogue.shipped().types.values()
    usual = image_for(config, catalogue.shipped().types.get(config.instance_type))
    image = found.ask("image", lambda: images.get(usual))
    if image is not None:
        found.ok("image", f"{usual} is {image.id}, {image.architecture}, {image.root_gib} GiB.")
    arm, gpu = (next(t for t in types if t.architecture == a and bool(t.gpu) == g) for a, g in _OTHERS)
    for name, known in (("image of ARM machines", arm), ("image of GPU machines", gpu)):
        other = image_for(config, known)
        if other == usual:
            continue
        try:
            found.ok(name, f"{other} is {images.get(other).id}.")
        except CloudError as e:
            found.warn(name, f"Such machines cannot be launched: {e.message}", e.remedy)
    return image


def _instance_type(found: Checklist, session: AwsSession, config: AwsConfig, image: Image | None) -> None:
    kind = config.instance_type
    name, zones = f"instance type {kind}", sorted({subnet.zone for subnet in config.subnets})
    known = catalogue.shipped().types.get(kind)
    if known is not None and image is not None and known.architecture != image.architecture:
        found.fail(
            name,
            f"It is {known.architecture}, and the image {image.id} is {image.architecture}.",
            "Use an image and an instance type of the same architecture.",
        )
        return
    offered = found.ask(
        name,
        lambda: {
            offer["Location"]
            for offer in session.pages(
                "ec2",
                "DescribeInstanceTypeOfferings",
                "InstanceTypeOfferings",
                LocationType="availability-zone",
                Filters=[{"Name": "instance-type", "Values": [kind]}],
            )
        },
        needed=False,
    )
    if offered is None:
        return
    missing = [zone for zone in zones if zone not in offered]
    if not missing:
        found.ok(name, f"Offered in {', '.join(zones)}.")
    elif offered.isdisjoint(zones):
        near = ", ".join(difflib.get_close_matches(kind, catalogue.shipped().types, 3))
        where = (
            f"none of {', '.join(zones)}, but in {', '.join(sorted(offered))}" if offered else "no zone of the region"
        )
        found.fail(name, f"AWS offers it in {where}.", f"Use another instance type{f', e.g. {near}' if near else ''}.")
    else:
        found.warn(
            name,
            f"AWS does not offer it in {', '.join(missing)}: launches there fail, and go to another zone.",
            "Use another instance type, or leave out those zones' subnets.",
        )


def _certificate(
    found: Checklist, session: AwsSession, config: AwsConfig, arn: str, now: Callable[[], datetime]
) -> None:
    name = "certificate"
    if arn.split(":")[3] != config.region:
        found.fail(name, f"{arn} is of another region than {config.region}.", "A load balancer takes those of its own.")
        return
    answer = found.ask(
        name, lambda: session.call("acm", "DescribeCertificate", arn, CertificateArn=arn)["Certificate"], needed=False
    )
    if answer is None:
        return
    ends = answer.get("NotAfter")
    if answer["Status"] != "ISSUED":
        found.fail(name, f"{arn} is {answer['Status']}.", "Have it validated, or name another one.")
    elif ends is not None and (ends - now()).days < EXPIRES_SOON_DAYS:
        found.warn(name, f"It ends at {ends:%Y-%m-%d %H:%M} UTC.", "Renew it.")
    else:
        found.ok(name, f"{answer.get('DomainName', arn)}, issued.")
