"""The CloudFormation template: it is sound, grants what ``rights`` says, and what it makes passes ``verify``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from clouds.aws.setup import rights
from clouds.aws.setup.template import cloudformation
from clouds.aws.setup.verify import checks
from heliostat.models.clouds import AwsCloudCreate, CheckState, CloudCreate, Trust
from tests.clouds.aws import moto_cloudformation, moto_iam
from tests.clouds.aws.moto_plus import KNOBS
from tests.clouds.aws.support import EXTERNAL_ID, REGION, Account, make_account
from tests.clouds.support import OURS

assert moto_cloudformation  # patches moto
TRUST = Trust(
    installation_id=OURS,
    external_id=EXTERNAL_ID,
    aws_principal="arn:aws:iam::111111111111:role/heliostat",
    issuer="https://heliostat.acme.example",
    subject="heliostat:x:org_1",
)


def template(trust: Trust = TRUST) -> str:
    return cloudformation(trust, REGION, "prod")


class _Loader(yaml.SafeLoader):
    """Reads ``!Ref x`` as ``{"Ref": x}``."""


def _tagged(loader: _Loader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
        if suffix == "GetAtt":
            value = value.split(".", 1)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)  # type: ignore[arg-type]
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _tagged)


def parsed(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(text, _Loader)
    return loaded


@pytest.mark.long
def test_cfn_lint_has_nothing_to_say(tmp_path: Path) -> None:
    for number, trust in enumerate([TRUST, TRUST.model_copy(update={"aws_principal": None})]):
        file = tmp_path / f"{number}.yaml"
        file.write_text(template(trust))
        lint = Path(sys.executable).with_name("cfn-lint")
        run = subprocess.run([lint, "--regions", REGION, "--", file], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr


def test_what_people_see() -> None:
    text = template()
    assert "@" not in text.replace("@heliostat", ""), "no marker is left"
    assert "stand-in" not in text
    assert "0000000" not in text
    known = parsed(text)
    assert known["Parameters"]["ControlPlanePrincipal"]["Default"] == TRUST.aws_principal
    assert known["Parameters"]["ZoneB"]["Default"] == f"{REGION}b"
    without = parsed(template(TRUST.model_copy(update={"aws_principal": None})))
    assert "Default" not in without["Parameters"]["ControlPlanePrincipal"], "it must be given"
    for resource in known["Resources"].values():
        rules = resource["Properties"].get("SecurityGroupIngress", [])
        assert all(rule["FromPort"] in (80, 443) for rule in rules), "no SSH, and load balancers alone are open"
    assert "--stack-name heliostat-team-1-a " in cloudformation(TRUST, REGION, "team.1_a")
    bucket = known["Resources"]["Bucket"]
    assert bucket["DeletionPolicy"] == "Retain"
    assert set(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == {True}


class Stack:
    """Made in an account of its own, by moto's CloudFormation."""

    def __init__(self, url: str, **parameters: str) -> None:
        self.account = make_account(url)
        client = self.account.client("cloudformation")
        client.create_stack(
            StackName="heliostat-prod",
            TemplateBody=json.dumps(parsed(template())),
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
        )
        (stack,) = client.describe_stacks(StackName="heliostat-prod")["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        (output,) = stack["Outputs"]
        assert output["OutputKey"] == "CloudYaml"
        self.cloud_yaml: str = output["OutputValue"]

    def cloud(self) -> AwsCloudCreate:
        read = TypeAdapter(CloudCreate).validate_python(yaml.safe_load(self.cloud_yaml))
        assert isinstance(read, AwsCloudCreate)
        return read

    def granted(self, role_arn: str) -> list[dict[str, Any]]:
        role = moto_iam.iam_backends[self.account.id]["aws"].get_role_by_arn(role_arn)
        return moto_iam.statements_of(role)


@pytest.fixture(autouse=True)
def _heal() -> Iterator[None]:
    yield
    KNOBS.faults.clear()


def verified(account: Account, cloud: AwsCloudCreate) -> dict[str, CheckState]:
    config = cloud.config.model_copy(update={"image": account.config.image})
    session = Account(account.url, account.id, config).session()
    found = checks(session, config, installation_id=OURS, api_url="https://heliostat.acme.example")
    elsewhere = {"image of ARM machines", "image of GPU machines"}
    return {c.name: c.state for c in found if c.state is not CheckState.OK and c.name not in elsewhere}


@pytest.mark.long
@pytest.mark.parametrize(
    "parameters",
    [{}, {"Outbound": "public"}, {"Services": "no"}],
    ids=["nat", "public", "no services"],
)
def test_what_it_makes_passes_verify_but_for_routes(moto_url: str, parameters: dict[str, str]) -> None:
    stack = Stack(moto_url, **parameters)
    cloud = stack.cloud()
    assert cloud.name == "prod"
    assert cloud.config.external_id == EXTERNAL_ID
    assert [subnet.zone for subnet in cloud.config.subnets] == [f"{REGION}a", f"{REGION}b"]
    assert len(cloud.config.balancer_subnets) == (0 if "Services" in parameters else 2)
    # moto's CloudFormation ties no subnet to a route table: what asks for a way out fails there, and nothing else may.
    routed = ("subnet ", "launch in ", "load balancers' subnets")
    assert [name for name in verified(stack.account, cloud) if not name.startswith(routed)] == []


@pytest.mark.long
def test_it_grants_what_rights_says_word_by_word(moto_url: str) -> None:
    certificate = f"arn:aws:acm:{REGION}:123456789012:certificate/0123"
    stack = Stack(moto_url, CertificateArn=certificate)
    config = stack.cloud().config
    assert config.balancer_certificate == certificate
    held = stack.account.client("iam").get_instance_profile(InstanceProfileName=config.instance_profile)
    profile = held["InstanceProfile"]
    machines = profile["Roles"][0]["Arn"]
    same = lambda statements: sorted(json.dumps(s, sort_keys=True) for s in statements)  # noqa: E731
    expected = rights.role_policy(config, OURS, machines)["Statement"]
    assert same(stack.granted(config.role_arn)) == same(expected)
    assert same(stack.granted(machines)) == same(rights.node_policy(config)["Statement"])
    role = moto_iam.iam_backends[stack.account.id]["aws"].get_role_by_arn(config.role_arn)
    trusted = role.assume_role_policy_document
    trusted = json.loads(trusted) if isinstance(trusted, str) else trusted
    assert trusted == rights.trust_policy(str(TRUST.aws_principal), EXTERNAL_ID)


@pytest.mark.long
def test_a_vpc_that_is_there(moto_url: str) -> None:
    account = make_account(moto_url)
    a, b = account.config.subnets
    stack = Stack.__new__(Stack)
    stack.account = account
    client = account.client("cloudformation")
    given = {
        "ExistingVpc": account.config.vpc_id,
        "ExistingMachinesA": a.id,
        "ExistingMachinesB": b.id,
        "ExistingPublicA": a.id,
        "ExistingPublicB": b.id,
    }
    client.create_stack(
        StackName="heliostat-prod",
        TemplateBody=json.dumps(parsed(template())),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
    )
    (described,) = client.describe_stacks(StackName="heliostat-prod")["Stacks"]
    stack.cloud_yaml = described["Outputs"][0]["OutputValue"]
    cloud = stack.cloud()
    assert cloud.config.vpc_id == account.config.vpc_id
    assert [subnet.id for subnet in cloud.config.subnets] == [a.id, b.id]
    assert verified(account, cloud) == {}
