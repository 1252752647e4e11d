"""Whom customers' roles are to trust: us, by the whole ARN, or with a word about what is not known of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clouds.aws.account.identity import Principal, principal
from clouds.vendors import InstalledVendors
from heliostat.models.clouds import CloudSetup, Provider
from runtime.keys import Keys
from runtime.settings import Settings
from tests.clouds.aws import moto_iam
from tests.clouds.aws.moto_plus import KNOBS, Fault
from tests.clouds.aws.support import REGION, Account, _session

WHOLE = "arn:aws:iam::{}:role/teams/ml/heliostat-control"


@pytest.fixture
def ours(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A session of a role with a path, in an account of its own."""
    monkeypatch.delenv("AWS_ROLE_ARN", raising=False)
    roles = moto_iam.iam_backends[aws_account.id]["aws"]
    if not any(role.name == "heliostat-control" for role in roles.get_roles()):
        trust = json.dumps({"Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": "*"}]})
        roles.create_role("heliostat-control", trust, "/teams/ml/", None, "", [], 3600)
    sts = _session("AKIACONTROLPLANE0000", "secret").create_client("sts", REGION, endpoint_url=aws_account.url)
    got = sts.assume_role(RoleArn=WHOLE.format(aws_account.id), RoleSessionName="heliostat")["Credentials"]
    return _session(got["AccessKeyId"], got["SecretAccessKey"], got["SessionToken"])


def refuse() -> None:
    """The control plane has no right of IAM."""
    KNOBS.faults.append(Fault("GetRole", "AccessDenied", 403, "not authorized to perform: iam:GetRole", times=9))


def test_a_roles_path_is_asked_of_iam(ours: Any, aws_account: Account) -> None:
    assert principal(aws_account.url, ours) == Principal(WHOLE.format(aws_account.id))


def test_or_taken_from_where_the_role_is_configured(
    ours: Any, aws_account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse()
    monkeypatch.setenv("AWS_ROLE_ARN", WHOLE.format(aws_account.id))
    assert principal(aws_account.url, ours) == Principal(WHOLE.format(aws_account.id))
    for other in (WHOLE.format("999999999999"), WHOLE.format(aws_account.id) + "-2"):
        monkeypatch.setenv("AWS_ROLE_ARN", other)
        found = principal(aws_account.url, ours)
        assert found is not None
        assert not found.whole, "it is another role's"


def test_what_nobody_tells_is_said_by_setup(
    ours: Any, aws_account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse()
    found = principal(aws_account.url, ours)
    assert found == Principal(f"arn:aws:iam::{aws_account.id}:role/heliostat-control", whole=False)
    vendors = InstalledVendors(Settings(home=tmp_path), Keys(bytes(32)))
    request = CloudSetup(provider=Provider.AWS, region=REGION, name="prod")
    monkeypatch.setattr(vendors, "_aws_principal", lambda: found)
    said = vendors.setup("org_1", request).next_step
    assert "aws iam get-role --role-name heliostat-control" in said
    assert "--parameter-overrides ControlPlanePrincipal=" in said
    monkeypatch.setattr(vendors, "_aws_principal", lambda: Principal(found.arn))
    assert "get-role" not in vendors.setup("org_1", request).next_step
    monkeypatch.setattr(vendors, "_aws_principal", lambda: None)
    assert "ControlPlanePrincipal=<ARN of the identity" in vendors.setup("org_1", request).next_step


def test_a_user_and_nobody(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    user = principal(aws_account.url, _session("AKIACONTROLPLANE0000", "secret"))
    assert user is not None
    assert user.whole
    assert user.arn.endswith(":user/moto")
    KNOBS.faults.append(Fault("GetCallerIdentity", "InvalidClientTokenId", 403, times=9))
    assert principal(aws_account.url, _session("AKIACONTROLPLANE0000", "secret")) is None
