"""What a cloud's config says of AWS, before anybody is asked."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from heliostat.models.clouds import AwsConfig

GOOD: dict[str, Any] = {
    "region": "us-west-2",
    "role_arn": "arn:aws:iam::123456789012:role/team/heliostat",
    "external_id": "heliostat-org_1",
    "vpc_id": "vpc-0123456789abcdef0",
    "subnets": [{"id": "subnet-0123456789abcdef0", "zone": "us-west-2a"}],
    "security_groups": ["sg-0123456789abcdef0"],
    "instance_profile": "heliostat-node",
    "bucket": "team-heliostat",
}


def test_what_is_needed_is_enough() -> None:
    config = AwsConfig.model_validate(GOOD)
    assert config.image.startswith("/aws/service/"), "a public parameter, so that images are renewed"
    for region in ("eu-central-1", "us-gov-west-1", "cn-north-1", "ap-southeast-7"):
        AwsConfig.model_validate(GOOD | {"region": region})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("region", "us-west2"),
        ("region", "us-west-2a"),
        ("role_arn", "arn:aws:iam::123456789012:user/me"),
        ("external_id", ""),
        ("vpc_id", "vpc-xyz"),
        ("subnets", []),
        ("subnets.0.id", [{"id": "sn-1", "zone": "us-west-2a"}]),
        ("security_groups", []),
        ("image", "ubuntu"),
        ("root_volume_gib", 4),
        ("bucket", "Team_Bucket"),
        ("bucket_prefix", "no-slash"),
        ("balancer_certificate", "arn:aws:iam::1:cert"),
        ("access_key", "AKIA…"),
    ],
)
def test_what_is_wrong_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        AwsConfig.model_validate(GOOD | {field.split(".")[0]: value})
    assert ".".join(str(part) for part in caught.value.errors()[0]["loc"]) == field
