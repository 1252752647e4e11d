"""Who we are to AWS, before any role of a customer's: the ARN that their roles trust."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import botocore.session
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

log = structlog.get_logger(__name__)

_ASSUMED = re.compile(r"arn:(?P<partition>aws[a-z-]*):sts::(?P<account>\d{12}):assumed-role/(?P<role>[^/]+)/.+")
REGION = "us-east-1"
"""Where none is configured."""
ANSWER_S = 5


@dataclass(frozen=True)
class Principal:
    arn: str
    """Of a role, the role's and not its session's."""
    whole: bool = True
    """False: the ARN is of a role whose path is unknown, because AWS did not return it."""


def principal(endpoint_url: str | None, source: botocore.session.Session | None = None) -> Principal | None:
    """One call of STS, which leaves out a role's path; that is taken from where the role is configured by its ARN, else
    asked of IAM, which needs ``iam:GetRole`` on that role. None: there are no credentials, or STS does not take them or
    does not answer, which is logged.

    Args:
        source: has the control plane's credentials; default: botocore's usual places.
    """
    session = source or botocore.session.Session()
    if session.get_credentials() is None:
        return None
    config = Config(connect_timeout=ANSWER_S, read_timeout=ANSWER_S, retries={"total_max_attempts": 2})
    region = session.get_config_variable("region") or REGION

    def client(service: str) -> Any:
        return session.create_client(service, region, endpoint_url=endpoint_url, config=config)

    try:
        arn = str(client("sts").get_caller_identity()["Arn"])
        assumed = _ASSUMED.fullmatch(arn)
        return Principal(arn) if assumed is None else _role(session, client, **assumed.groupdict())
    except (ClientError, BotoCoreError) as e:
        log.warning("AWS does not return the caller's identity", why=str(e))
        return None


def _role(
    session: botocore.session.Session, client: Callable[[str], Any], partition: str, account: str, role: str
) -> Principal:
    """In one account no two roles have one name, whatever their paths."""
    this = re.compile(rf"arn:{partition}:iam::{account}:role/([^:]+/)?{re.escape(role)}")
    for configured in (os.environ.get("AWS_ROLE_ARN"), session.get_scoped_config().get("role_arn")):
        if configured and this.fullmatch(configured):
            return Principal(configured)
    try:
        return Principal(str(client("iam").get_role(RoleName=role)["Role"]["Arn"]))
    except (ClientError, BotoCoreError) as e:
        log.info("AWS does not return the path of the caller's role", role=role, why=str(e))
        return Principal(f"arn:{partition}:iam::{account}:role/{role}", whole=False)
