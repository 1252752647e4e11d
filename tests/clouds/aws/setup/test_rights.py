"""The policies that are granted hold every call that is made."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from clouds.aws.account.errors import action_of
from clouds.aws.setup import rights
from heliostat.models.clouds import AwsConfig
from tests.clouds.aws.test_config import GOOD
from tests.clouds.support import OURS, ROOT

SERVICES = {"acm", "ec2", "elbv2", "iam", "s3", "ssm"}
INDIRECT = {
    ("s3", "PutObject"),  # by presigned URLs
    ("s3", "GetObject"),
    ("ec2", "DeleteVolume"),  # by a name in a variable
    ("ec2", "DeleteNetworkInterface"),
}
NODE_ROLE = "arn:aws:iam::123456789012:role/heliostat-node"


def strings(tree: ast.AST) -> Iterator[str]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))


def calls() -> set[tuple[str, str]]:
    """Of ``call``, ``pages``, and of the modules' own short forms of them."""
    found = set(INDIRECT)
    short = {"_call": "s3", "_set": "elbv2"}
    for path in Path(ROOT / "clouds" / "aws").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            given = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if node.func.attr in ("call", "pages") and len(given) >= 2 and given[0] in SERVICES:
                found.add((given[0], given[1]))
            elif node.func.attr in short and given:
                found.add((short[node.func.attr], given[0]))
    return found


@pytest.fixture
def config() -> AwsConfig:
    subnets = ["subnet-0123456789abcdef0", "subnet-0123456789abcdef1"]
    certificate = "arn:aws:acm:us-west-2:123456789012:certificate/0123"
    more = {"balancer_subnets": subnets, "balancer_certificate": certificate, "bucket_prefix": "heliostat/"}
    return AwsConfig.model_validate(GOOD | more)


def test_every_call_has_its_right(config: AwsConfig) -> None:
    made = calls()
    assert len(made) > 30, "they are found at all"
    # Parts of an upload are PutObject's right; HeadObject is GetObject's.
    parts = {"CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"}
    needed = {"s3:PutObject" if operation in parts else action_of(service, operation) for service, operation in made}
    granted = rights.actions(rights.role_policy(config, OURS, NODE_ROLE))
    assert needed <= granted
    beside = {"ec2:CreateTags", "iam:PassRole", "iam:CreateServiceLinkedRole", *rights.ASKED_BY_ELB}
    assert granted <= needed | beside, "and nothing more"


def test_what_elb_asks_of_ec2_in_our_name_may_be_asked(config: AwsConfig) -> None:
    """By https://docs.aws.amazon.com/elasticloadbalancing/latest/userguide/elb-api-permissions.html."""
    vpcs, subnets = {"ec2:DescribeInternetGateways", "ec2:DescribeVpcs"}, {"ec2:DescribeSubnets"}
    of_calls = {
        "CreateLoadBalancer": {"ec2:DescribeAccountAttributes", "ec2:DescribeAddresses", "ec2:DescribeSecurityGroups"}
        | vpcs
        | subnets,
        "CreateTargetGroup": vpcs,
        "RegisterTargets": {"ec2:DescribeInstances"} | vpcs | subnets,
    }
    granted = rights.actions(rights.role_policy(config, OURS, NODE_ROLE))
    for call, wanted in of_calls.items():
        assert ("elbv2", call) in calls()
        assert wanted | {"iam:CreateServiceLinkedRole"} <= granted
    without = rights.role_policy(config.model_copy(update={"balancer_subnets": []}), OURS, NODE_ROLE)
    assert rights.actions(without).isdisjoint(rights.ASKED_BY_ELB), "nothing that no service needs"


def test_what_can_be_scoped_is(config: AwsConfig) -> None:
    policy = rights.role_policy(config, OURS, NODE_ROLE)
    wide = [s["Sid"] for s in policy["Statement"] if s["Resource"] == "*"]
    assert wide == ["Describe", "LookAsElbDoes"]
    text = json.dumps(policy)
    assert len(json.dumps(policy, separators=(",", ":"))) < 10240, (
        "inline policies of a role may have so many characters"
    )
    assert "*:*" not in text
    assert f'"aws:ResourceTag/heliostat-installation": "{OURS}"' in text
    assert "arn:aws:s3:::team-heliostat/heliostat/*" in text
    assert "arn:aws:ssm:us-west-2::parameter/aws/service/ami-amazon-linux-latest/" in text
    without = rights.role_policy(config.model_copy(update={"balancer_subnets": []}), OURS, NODE_ROLE)
    assert not any(a.startswith("elasticloadbalancing:Create") for a in rights.actions(without))
    own = {"image": "ami-0123456789abcdef0", "gpu_image": "ami-0123456789abcdef1", "arm_image": "ami-0123456789abcdef2"}
    named = rights.role_policy(config.model_copy(update=own), OURS, NODE_ROLE)
    assert "ssm:GetParameter" not in rights.actions(named)


def test_trust_is_for_one_principal_and_one_external_id() -> None:
    (statement,) = rights.trust_policy("arn:aws:iam::111111111111:role/heliostat", "heliostat-org_1")["Statement"]
    assert statement["Principal"] == {"AWS": "arn:aws:iam::111111111111:role/heliostat"}
    assert statement["Condition"] == {"StringEquals": {"sts:ExternalId": "heliostat-org_1"}}


def test_machines_have_objects_and_images_alone(config: AwsConfig) -> None:
    granted = rights.actions(rights.node_policy(config))
    assert {a.split(":")[0] for a in granted} == {"s3", "ecr"}
    assert "s3:DeleteObject" not in granted
