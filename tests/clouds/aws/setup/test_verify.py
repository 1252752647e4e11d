"""``cloud verify`` of AWS: nothing wrong is all OK, and each thing that is wrong is its own line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from moto.s3.exceptions import S3AccessDeniedError

from clouds.aws.setup import rights
from clouds.aws.setup.verify import checks
from clouds.checklist import PROBE
from heliostat.models.clouds import AwsSubnet, Check, CheckState
from heliostat.models.common import utcnow
from tests.clouds.aws.moto_iam import iam_backends
from tests.clouds.aws.moto_plus import KNOBS, Fault, ec2_backends
from tests.clouds.aws.moto_s3 import s3_backends
from tests.clouds.aws.support import REGION, Account, make_account
from tests.clouds.support import OURS

long = pytest.mark.long
API = "https://heliostat.acme.example"
ELSEWHERE = {"image of ARM machines", "image of GPU machines"}
"""AWS's own images, which moto has not; they are warned of."""


@pytest.fixture
def account(aws_account: Account) -> Account:
    aws_account.bucket()
    return aws_account


@pytest.fixture
def broken(moto_url: str) -> Iterator[Account]:
    """One that the test may spoil."""
    account = make_account(moto_url)
    account.bucket()
    yield account
    KNOBS.faults.clear()


def lines(account: Account, api_url: str = API, **changes: Any) -> dict[str, Check]:
    config = account.config.model_copy(update=changes)
    found = checks(account.session(**changes), config, installation_id=OURS, api_url=api_url)
    assert len({check.name for check in found}) == len(found), "one line for each thing"
    for check in found:
        assert check.detail or check.state is CheckState.OK, check
        assert check.remedy or check.state is not CheckState.FAILED, check
    return {check.name: check for check in found}


def wrong(found: dict[str, Check]) -> set[str]:
    return {name for name, check in found.items() if check.state is not CheckState.OK}


def test_nothing_wrong(account: Account) -> None:
    since = len(KNOBS.calls)
    found = lines(account)
    assert wrong(found) <= ELSEWHERE
    assert {"role", "external id", "clock", "region", "right ec2:TerminateInstances"} <= set(found)
    assert {"bucket write", "bucket delete", f"launch in {account.config.subnets[1].id}"} <= set(found)
    made = [call for call in KNOBS.calls[since:] if call.get("Action") == "RunInstances"]
    assert [call["DryRun"] for call in made] == ["true", "true"]
    assert not ec2_backends[account.id][REGION].reservations, "nothing was launched"
    assert not s3_backends[account.id]["aws"].buckets[account.config.bucket].keys, "the probe is gone"


def test_a_role_that_is_not_ours(account: Account) -> None:
    found = lines(account, external_id="another")
    assert found["role"].state is CheckState.FAILED
    assert "sts:ExternalId" in found["role"].remedy
    for behind in ("rights", "bucket", "launch"):
        assert found[behind].state is CheckState.SKIPPED
        assert "`role`" in found[behind].detail


@long
@pytest.mark.parametrize(
    ("condition", "words"),
    [({}, "without any external id"), ({"StringLike": {"sts:ExternalId": "*"}}, "under any external id")],
)
def test_a_role_that_anybody_can_name(broken: Account, condition: dict[str, Any], words: str) -> None:
    role = iam_backends[broken.id]["aws"].get_role("heliostat")
    policy = json.loads(role.assume_role_policy_document)
    policy["Statement"][0]["Condition"] = condition
    role.assume_role_policy_document = json.dumps(policy)
    found = lines(broken)
    assert found["role"].state is CheckState.OK
    assert found["external id"].state is CheckState.FAILED
    assert words in found["external id"].detail
    assert json.dumps({"StringEquals": {"sts:ExternalId": broken.config.external_id}}) in found["external id"].remedy


def test_a_right_that_elb_uses_in_our_name(account: Account) -> None:
    KNOBS.faults.append(Fault("DescribeInternetGateways", "UnauthorizedOperation", 403, times=1e9))
    try:
        found = lines(account)
    finally:
        KNOBS.faults.clear()
    assert wrong(found) - ELSEWHERE == {"right ec2:DescribeInternetGateways"}
    assert '"ec2:DescribeInternetGateways"' in found["right ec2:DescribeInternetGateways"].remedy


@long
def test_a_clock_that_is_wrong(account: Account) -> None:
    for off, state in ((100, CheckState.WARNING), (-600, CheckState.FAILED), (5, CheckState.OK)):
        found = checks(
            account.shared,
            account.config,
            installation_id=OURS,
            api_url=API,
            now=lambda off=off: utcnow() + timedelta(seconds=off),  # type: ignore[misc]
        )
        (clock,) = [check for check in found if check.name == "clock"]
        assert clock.state is state
        assert ("behind" in clock.detail) == (off < 0)


def test_a_region_that_is_misspelt(account: Account) -> None:
    """As nobody answers at its name."""
    elsewhere = Account("http://127.0.0.1:9", account.id, account.config)
    found = lines(elsewhere, region="us-wset-2")
    assert found["region"].state is CheckState.FAILED
    assert "us-west-2" in found["region"].remedy
    assert found["role"].state is CheckState.FAILED
    assert found["launch"].state is CheckState.SKIPPED


@long
@pytest.mark.parametrize(
    "action",
    [
        "ec2:TerminateInstances",
        "ec2:GetConsoleOutput",
        "elasticloadbalancing:ModifyListener",
        "elasticloadbalancing:CreateTargetGroup",
    ],
)
def test_a_right_that_is_missing_is_named_with_its_line(broken: Account, action: str) -> None:
    policy = rights.role_policy(broken.config, OURS, f"arn:aws:iam::{broken.id}:role/heliostat-node")
    expected = rights.granting(policy, action)
    for statement in policy["Statement"]:
        statement["Action"] = [a for a in statement["Action"] if a != action]
    policy["Statement"] = [s for s in policy["Statement"] if s["Action"]]
    iam_backends[broken.id]["aws"].put_role_policy("heliostat", "heliostat", json.dumps(policy))
    found = lines(broken)
    assert wrong(found) - ELSEWHERE == {f"right {action}"}
    assert found[f"right {action}"].state is CheckState.FAILED
    for statement in expected:
        assert json.dumps(statement) in found[f"right {action}"].remedy


@long
def test_rights_for_another_installations_tag_are_none(broken: Account) -> None:
    policy = rights.role_policy(broken.config, "another", f"arn:aws:iam::{broken.id}:role/heliostat-node")
    iam_backends[broken.id]["aws"].put_role_policy("heliostat", "heliostat", json.dumps(policy))
    assert lines(broken)["right ec2:TerminateInstances"].state is CheckState.FAILED


@long
@pytest.mark.parametrize(
    ("operation", "action", "names"),
    [
        ("DescribeInstances", "ec2:DescribeInstances", ["right ec2:DescribeInstances"]),
        ("RunInstances", "iam:PassRole", ["launch in {0}", "launch in {1}"]),
        ("RunInstances", "ec2:CreateTags", ["launch in {0}", "launch in {1}"]),
    ],
)
def test_a_right_that_ec2_refuses(account: Account, operation: str, action: str, names: list[str]) -> None:
    message = (
        f"You are not authorized to perform this operation. User: arn:aws:sts::{account.id}:assumed-role/x/y is "
        f"not authorized to perform: {action} on resource: arn:aws:ec2:x because no identity-based policy allows it"
    )
    KNOBS.faults.append(Fault(operation, "UnauthorizedOperation", 403, message, times=9))
    found = lines(account)
    named = {name.format(*(s.id for s in account.config.subnets)) for name in names}
    assert wrong(found) - ELSEWHERE == named
    policy = rights.role_policy(account.config, OURS, f"arn:aws:iam::{account.id}:role/heliostat-node")
    for name in named:
        assert json.dumps(rights.granting(policy, action)[0]) in found[name].remedy


@long
def test_what_only_verify_needs_fails_nothing(broken: Account) -> None:
    broken.config = broken.config.model_copy(update={"instance_type": "m6i.large"})
    for operation in ("DescribeSubnets", "DescribeSecurityGroups", "SimulatePrincipalPolicy", "GetInstanceProfile"):
        KNOBS.faults.append(Fault(operation, "AccessDenied", 403, times=9))
    found = lines(broken)
    assert not [c for c in found.values() if c.state is CheckState.FAILED]
    assert "ec2:DescribeSubnets" in found["subnets"].remedy
    assert "iam:SimulatePrincipalPolicy" in found["right ec2:TerminateInstances"].remedy
    assert found["launch in " + broken.config.subnets[0].id].state is CheckState.OK


@long
def test_subnets_that_are_not_as_written(account: Account) -> None:
    a, b = account.config.subnets
    found = lines(
        account, subnets=[AwsSubnet(id=a.id, zone="us-west-2c"), AwsSubnet(id="subnet-0123abcd", zone=b.zone)]
    )
    assert "us-west-2a" in found[f"subnet {a.id}"].detail
    assert "no such subnet" in found["subnet subnet-0123abcd"].detail
    assert found["launch in subnet-0123abcd"].state is CheckState.SKIPPED
    found = lines(account, vpc_id="vpc-0123456789abcdef0")
    assert "not of vpc-0123456789abcdef0" in found[f"subnet {a.id}"].detail
    assert "not of vpc-0123456789abcdef0" in found[f"security group {account.config.security_groups[0]}"].detail


@long
def test_a_subnet_that_is_full(broken: Account) -> None:
    a, b = broken.config.subnets
    subnets = ec2_backends[broken.id][REGION].subnets
    subnets[a.zone][a.id]._available_ip_addresses = 0
    subnets[b.zone][b.id]._available_ip_addresses = 9
    found = lines(broken, balancer_subnets=[])
    assert found[f"subnet {a.id}"].state is CheckState.FAILED
    assert "full" in found[f"subnet {a.id}"].detail
    assert found[f"launch in {a.id}"].state is CheckState.SKIPPED
    assert found[f"subnet {b.id}"].state is CheckState.WARNING
    assert found[f"launch in {b.id}"].state is CheckState.OK


@long
def test_a_subnet_without_a_route_to_us(broken: Account) -> None:
    ec2 = ec2_backends[broken.id][REGION]
    (table,) = [t for t in ec2.route_tables.values() if t.vpc_id == broken.config.vpc_id]
    a, b = broken.config.subnets
    ec2.modify_subnet_attribute(a.id, "map_public_ip_on_launch", "false")
    found = lines(broken)
    assert "no public address" in found[f"subnet {a.id}"].detail
    assert found[f"subnet {b.id}"].state is CheckState.OK
    ec2.delete_route(table.id, "0.0.0.0/0")
    found = lines(broken, api_url="https://203.0.113.9")
    assert "no route to the control plane" in found[f"subnet {b.id}"].detail
    assert found["load balancers' subnets"].state is CheckState.FAILED
    private = lines(broken, api_url="https://10.0.7.7")
    assert "to us by 10.0.0.0/16" in private[f"subnet {b.id}"].detail
    assert private["api_url"].state is CheckState.WARNING
    network = ec2.create_network_interface(ec2.get_subnet(a.id), None)
    ec2.create_route(table.id, "0.0.0.0/0", interface_id=network.id)
    assert "by eni-" in lines(broken)[f"subnet {a.id}"].detail


@long
def test_security_groups(broken: Account) -> None:
    ec2 = ec2_backends[broken.id][REGION]
    bare = ec2.create_security_group("bare", "bare", broken.config.vpc_id).id
    ec2.authorize_security_group_ingress(bare, "tcp", "22", "22", [{"CidrIp": "0.0.0.0/0"}])
    found = lines(broken, security_groups=[bare])
    assert found["machines among themselves"].state is CheckState.FAILED
    assert found["machines from outside"].state is CheckState.WARNING
    assert "tcp 22" in found["machines from outside"].detail
    assert "8000, 9000" in found["load balancers to machines"].detail
    source = {"GroupId": broken.config.balancer_security_groups[0]}
    ec2.authorize_security_group_ingress(bare, "tcp", "8000", "9000", [], source_groups=[source])
    ec2.authorize_security_group_ingress(bare, "-1", "-1", "-1", [], source_groups=[{"GroupId": bare}])
    ec2.revoke_security_group_egress(bare, "-1", "-1", "-1", [{"CidrIp": "0.0.0.0/0"}])
    found = lines(broken, security_groups=[bare])
    assert found["machines among themselves"].state is CheckState.OK
    assert found["load balancers to machines"].state is CheckState.OK
    assert found["machines outwards"].state is CheckState.FAILED
    found = lines(broken, security_groups=["sg-0123abcd"])
    assert "no such group" in found["security group sg-0123abcd"].detail
    assert found["machines among themselves"].state is CheckState.SKIPPED


@long
def test_images_and_types(account: Account) -> None:
    found = lines(account, image="ami-00000000000000000")
    assert found["image"].state is CheckState.FAILED
    assert "ami-00000000000000000" in found["image"].detail
    assert found[f"launch in {account.config.subnets[0].id}"].state is CheckState.SKIPPED
    found = lines(account, image="/heliostat/no/such")
    assert "ParameterNotFound" in found["image"].detail
    found = lines(account, instance_type="m6i.lrge")
    assert "no zone of the region" in found["instance type m6i.lrge"].detail
    assert "m6i.large" in found["instance type m6i.lrge"].remedy


@long
@pytest.mark.parametrize(
    ("zones", "state"),
    [([], CheckState.FAILED), (["us-west-2a"], CheckState.WARNING), (["us-west-2z"], CheckState.FAILED)],
)
def test_a_type_that_a_zone_does_not_offer(account: Account, zones: list[str], state: CheckState) -> None:
    items = "".join(
        f"<item><instanceType>m6i.large</instanceType><locationType>availability-zone</locationType>"
        f"<location>{zone}</location></item>"
        for zone in zones
    )
    answer = (
        '<DescribeInstanceTypeOfferingsResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
        f"<instanceTypeOfferingSet>{items}</instanceTypeOfferingSet></DescribeInstanceTypeOfferingsResponse>"
    )
    KNOBS.faults.append(Fault("DescribeInstanceTypeOfferings", answer=answer))
    found = lines(account)["instance type m6i.large"]
    assert found.state is state
    if zones == ["us-west-2a"]:
        assert "us-west-2b" in found.detail


@long
def test_buckets(account: Account, moto_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines(account, bucket="nobody-has-such-a-bucket")
    assert "NoSuchBucket" in found["bucket"].detail
    assert found["bucket write"].state is CheckState.SKIPPED
    held = s3_backends[account.id]["aws"].buckets[account.config.bucket]
    monkeypatch.setattr(held, "region_name", "eu-central-1")
    found = lines(account)
    assert "eu-central-1" in found["bucket"].detail
    assert found["bucket"].state is CheckState.FAILED


@long
def test_a_bucket_of_another_account(account: Account, moto_url: str) -> None:
    other = make_account(moto_url)
    other.bucket()
    found = lines(account, bucket=other.config.bucket)
    assert f"another account than {account.id}" in found["bucket"].detail
    assert found["bucket write"].state is CheckState.SKIPPED
    assert not s3_backends[other.id]["aws"].buckets[other.config.bucket].keys


@long
def test_a_bucket_that_may_not_be_written(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: object, *args: object, **kwargs: object) -> None:
        raise S3AccessDeniedError

    monkeypatch.setattr("moto.s3.models.S3Backend.put_object", refused)
    found = lines(account)
    assert found["bucket write"].state is CheckState.FAILED
    assert '"s3:PutObject"' in found["bucket write"].remedy
    assert f"{account.config.bucket}/*" in found["bucket write"].remedy
    assert found["bucket delete"].state is CheckState.SKIPPED


@long
def test_load_balancers_subnets(account: Account) -> None:
    a, _ = account.config.balancer_subnets
    assert "two zones" in lines(account, balancer_subnets=[a])["load balancers' subnets"].detail
    found = lines(account, balancer_subnets=[a, "subnet-0123abcd"])
    assert "subnet-0123abcd" in found["load balancers' subnets"].detail
    assert "load balancers' subnets" not in lines(account, balancer_subnets=[])


@long
@pytest.mark.parametrize(
    ("url", "state"),
    [
        ("http://127.0.0.1:8080", CheckState.FAILED),
        ("http://localhost:8080", CheckState.FAILED),
        ("https://192.168.1.4", CheckState.WARNING),
        ("http://heliostat.acme.example", CheckState.WARNING),
        (API, CheckState.OK),
    ],
)
def test_an_api_that_machines_can_not_call(account: Account, url: str, state: CheckState) -> None:
    assert lines(account, api_url=url)["api_url"].state is state


@long
def test_the_probe_is_under_the_prefix(account: Account) -> None:
    found = lines(account, bucket_prefix="team/")
    assert f"{account.config.bucket}/team/{PROBE}" in found["bucket write"].detail
