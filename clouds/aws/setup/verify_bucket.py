"""The bucket: its owner, its region, and whether it can be written to and read from."""

from __future__ import annotations

from clouds.aws.account.session import AwsSession
from clouds.aws.bucket import AwsBucket
from clouds.aws.setup import rights
from clouds.aws.setup.verify_rights import add_to_role
from clouds.checklist import Checklist
from clouds.contract.errors import Denied
from heliostat.errors import CloudError
from heliostat.models.clouds import AwsConfig

_OLD_NAMES = {None: "us-east-1", "": "us-east-1", "EU": "eu-west-1"}
"""What GetBucketLocation says of two regions."""


def looked_at(found: Checklist, session: AwsSession, config: AwsConfig) -> None:
    _whose(found, session, config)
    found.bucket_works(AwsBucket(config, session), f"{config.bucket}/{config.bucket_prefix}")


def _whose(found: Checklist, session: AwsSession, config: AwsConfig) -> None:
    name = "bucket"
    try:
        region = _location(session, config, ExpectedBucketOwner=session.account)
    except Denied as e:
        _location_unknown(found, session, config, e)
        return
    except CloudError as e:
        found.fail(name, e.message, e.remedy)
        return
    if region != config.region:
        found.fail(
            name,
            f"Bucket {config.bucket} is in {region}, and the cloud in {config.region}.",
            "Name a bucket of the cloud's region: URLs are signed for that, and traffic between regions costs money.",
        )
        return
    found.ok(name, f"{config.bucket} is of account {session.account}, in {region}.")


def _location_unknown(found: Checklist, session: AwsSession, config: AwsConfig, refused: Denied) -> None:
    """S3 says the same of a bucket of another account as of a missing right, so it is asked once more."""
    try:
        _location(session, config)
    except CloudError:
        policy = rights.role_policy(config, "", config.role_arn)
        found.warn(
            "bucket",
            f"S3 does not say whose bucket {config.bucket} is, nor where: it is another account's, or a right is "
            f"missing ({refused.message}).",
            add_to_role(rights.granting(policy, "s3:GetBucketLocation")),
        )
    else:
        found.fail(
            "bucket",
            f"Bucket {config.bucket} belongs to another account than {session.account}.",
            "Name a bucket of the cloud's own account: code and logs would be its owner's.",
        )


def _location(session: AwsSession, config: AwsConfig, **expected: str) -> str:
    answer = session.call("s3", "GetBucketLocation", config.bucket, Bucket=config.bucket, **expected)
    constraint = answer.get("LocationConstraint")
    return _OLD_NAMES.get(constraint) or str(constraint)
