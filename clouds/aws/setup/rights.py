"""The rights that an AWS cloud needs, as policy documents: for templates, for ``verify``, and for people to read.

Least privilege: a new resource must carry our installation's tag from the first moment, and only what carries it may be
changed or ended (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/supported-iam-actions-tagging.html). Describing
calls know no such condition. ``tests/clouds/aws/setup/test_rights.py`` holds that every call of ours has its
action here;
the conditions themselves only AWS can check: moto ignores them.
"""

from __future__ import annotations

from typing import Any

from clouds.aws.machines.images import GPU_IMAGE
from clouds.contract.machines import OWNER_TAG
from heliostat.models.clouds import AwsConfig

Policy = dict[str, Any]

DESCRIBE = (
    "ec2:DescribeInstances",
    "ec2:DescribeVolumes",
    "ec2:DescribeNetworkInterfaces",
    "ec2:DescribeImages",
    # What `cloud verify` looks at; running machines takes none of these.
    "ec2:DescribeSubnets",
    "ec2:DescribeRouteTables",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeInstanceTypeOfferings",
    "elasticloadbalancing:DescribeLoadBalancers",
    "elasticloadbalancing:DescribeTargetGroups",
    "elasticloadbalancing:DescribeTargetHealth",
    "elasticloadbalancing:DescribeListeners",
    "elasticloadbalancing:DescribeRules",
    "elasticloadbalancing:DescribeTags",
)
ASKED_BY_ELB = (
    "ec2:DescribeAccountAttributes",
    "ec2:DescribeAddresses",
    "ec2:DescribeInternetGateways",
    "ec2:DescribeVpcs",
)
"""Of EC2, in our name: ELB refuses to make load balancers and groups, and to register targets, for who may not look at
these (https://docs.aws.amazon.com/elasticloadbalancing/latest/userguide/elb-api-permissions.html; the rest of what that
page wants is in ``DESCRIBE``)."""
MAKE_BALANCERS = (
    "elasticloadbalancing:CreateLoadBalancer",
    "elasticloadbalancing:CreateTargetGroup",
)
CHANGE_BALANCERS = (
    "elasticloadbalancing:AddTags",
    "elasticloadbalancing:RemoveTags",
    "elasticloadbalancing:CreateListener",
    "elasticloadbalancing:ModifyListener",
    "elasticloadbalancing:CreateRule",
    "elasticloadbalancing:ModifyRule",
    "elasticloadbalancing:DeleteRule",
    "elasticloadbalancing:ModifyLoadBalancerAttributes",
    "elasticloadbalancing:ModifyTargetGroupAttributes",
    "elasticloadbalancing:RegisterTargets",
    "elasticloadbalancing:DeregisterTargets",
    "elasticloadbalancing:DeleteLoadBalancer",
    "elasticloadbalancing:DeleteTargetGroup",
)
OBJECTS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")


def trust_policy(principal: str, external_id: str) -> Policy:
    """Of the role that the control plane assumes: by ``principal`` (ARN of its own role, user or account) alone, and
    only with the organization's external id."""
    condition = {"StringEquals": {"sts:ExternalId": external_id}}
    return _policy(
        {"Effect": "Allow", "Principal": {"AWS": principal}, "Action": "sts:AssumeRole", "Condition": condition}
    )


def role_policy(config: AwsConfig, installation_id: str, node_role_arn: str) -> Policy:
    """Of that role.

    Args:
        node_role_arn: the role in ``config.instance_profile``, the only one that may be given to machines.
    """
    partition, account = config.role_arn.split(":")[1], config.role_arn.split(":")[4]
    region = config.region
    ec2 = f"arn:{partition}:ec2:{region}:{account}"
    elb = f"arn:{partition}:elasticloadbalancing:{region}:{account}"
    asked = {"StringEquals": {f"aws:RequestTag/{OWNER_TAG}": installation_id}}
    ours = {"StringEquals": {f"aws:ResourceTag/{OWNER_TAG}": installation_id}}
    made = ("instance", "volume", "network-interface")
    used = [
        *(f"{ec2}:subnet/{subnet.id}" for subnet in config.subnets),
        *(f"{ec2}:security-group/{group}" for group in config.security_groups),
        f"arn:{partition}:ec2:{region}::image/*",
        f"arn:{partition}:ec2:{region}::snapshot/*",
        f"{ec2}:spot-instances-request/*",  # what SPOT creates with the instance, and ends with it
    ]
    listeners = [f"{elb}:{kind}/app/hs-*" for kind in ("loadbalancer", "listener", "listener-rule")]
    groups = f"{elb}:targetgroup/hs-*"
    statements = [
        _allow("Describe", DESCRIBE, "*"),
        # The latter two: what a head keeps.
        _allow(
            "LaunchTagged",
            ["ec2:RunInstances", "ec2:CreateVolume", "ec2:CreateNetworkInterface"],
            [f"{ec2}:{kind}/*" for kind in made],
            asked,
        ),
        _allow("LaunchWith", ["ec2:RunInstances", "ec2:CreateNetworkInterface"], used),
        _allow("LaunchWithKept", ["ec2:RunInstances"], f"{ec2}:network-interface/*", ours),
        _allow(
            "TagWhatIsLaunched",
            ["ec2:CreateTags"],
            [f"{ec2}:{kind}/*" for kind in made],
            {"StringEquals": {"ec2:CreateAction": ["RunInstances", "CreateVolume", "CreateNetworkInterface"]}},
        ),
        _allow(
            "EndOurs",
            [
                "ec2:TerminateInstances",
                "ec2:GetConsoleOutput",
                "ec2:AttachVolume",
                "ec2:DeleteVolume",
                "ec2:DeleteNetworkInterface",
            ],
            [f"{ec2}:{kind}/*" for kind in made],
            ours,
        ),
        _allow(
            "GiveMachinesTheirRole",
            ["iam:PassRole"],
            node_role_arn,
            {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}},
        ),
        # AWS makes them at an account's first spot machine and load balancer.
        _allow(
            "ServiceLinkedRoles",
            ["iam:CreateServiceLinkedRole"],
            f"arn:{partition}:iam::{account}:role/aws-service-role/*",
            {"StringEquals": {"iam:AWSServiceName": ["spot.amazonaws.com", "elasticloadbalancing.amazonaws.com"]}},
        ),
        _allow("Objects", OBJECTS, f"arn:{partition}:s3:::{config.bucket}/{config.bucket_prefix}*"),
        _allow(
            "ListObjects",
            ["s3:ListBucket"],
            f"arn:{partition}:s3:::{config.bucket}",
            # No condition where all of the bucket is ours: with one, S3 says 403 of each object that is not there.
            {"StringLike": {"s3:prefix": f"{config.bucket_prefix}*"}} if config.bucket_prefix else None,
        ),
        # For `cloud verify` alone, as well.
        _allow("WhereTheBucketIs", ["s3:GetBucketLocation"], f"arn:{partition}:s3:::{config.bucket}"),
        _allow("LookAtOwnRights", ["iam:SimulatePrincipalPolicy"], config.role_arn),
        _allow(
            "LookAtMachinesRole",
            ["iam:GetInstanceProfile"],
            f"arn:{partition}:iam::{account}:instance-profile/{config.instance_profile}",
        ),
    ]
    images = {config.image, config.gpu_image or GPU_IMAGE, config.arm_image}
    parameters = [
        f"arn:{partition}:ssm:{region}:{'' if name.startswith('/aws/') else account}:parameter{name}"
        for name in sorted(images)
        if name.startswith("/")
    ]
    if parameters:
        statements.append(_allow("NamesOfImages", ["ssm:GetParameter"], parameters))
    if config.balancer_certificate is not None:
        statements.append(_allow("LookAtCertificate", ["acm:DescribeCertificate"], config.balancer_certificate))
    if config.balancer_subnets:
        statements += [
            _allow("LookAsElbDoes", ASKED_BY_ELB, "*"),
            _allow("MakeBalancers", MAKE_BALANCERS, [listeners[0], groups], asked),
            _allow(
                "TagBalancersAsTheyAreMade",
                ["elasticloadbalancing:AddTags"],
                [listeners[0], groups],
                {"StringEquals": {"elasticloadbalancing:CreateAction": ["CreateLoadBalancer", "CreateTargetGroup"]}},
            ),
            # Listeners and rules carry no tag of ours: they are known by their load balancer's name.
            _allow("ChangeBalancers", CHANGE_BALANCERS, [listeners[0], groups], ours),
            _allow("ChangeRules", [a for a in CHANGE_BALANCERS if "Rule" in a or "Listener" in a], listeners[1:]),
        ]
    return _policy(*statements)


def node_policy(config: AwsConfig) -> Policy:
    """Of machines: their cloud's own objects, and pulling images from ECR. No right on EC2: a machine ends itself by
    shutting down."""
    partition = config.role_arn.split(":")[1]
    pull = ("ecr:GetAuthorizationToken", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer")
    return _policy(
        _allow(
            "Objects", ["s3:GetObject", "s3:PutObject"], f"arn:{partition}:s3:::{config.bucket}/{config.bucket_prefix}*"
        ),
        _allow("PullImages", pull, "*"),
    )


def granting(policy: Policy, action: str) -> list[dict[str, Any]]:
    """The statements of a policy that allow an action, with that action alone: the lines to add where it is missing."""
    return [{**statement, "Action": [action]} for statement in policy["Statement"] if action in statement["Action"]]


def actions(policy: Policy) -> set[str]:
    return {action for statement in policy["Statement"] for action in statement["Action"]}


def _allow(
    sid: str, actions: list[str] | tuple[str, ...], resource: str | list[str], condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    statement = {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": resource}
    return statement if condition is None else statement | {"Condition": condition}


def _policy(*statements: dict[str, Any]) -> Policy:
    return {"Version": "2012-10-17", "Statement": list(statements)}
