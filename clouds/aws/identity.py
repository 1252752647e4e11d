"""Who we are to AWS, before any role of a customer's: the ARN that their roles trust."""

from __future__ import annotations

import re

import botocore.session
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

log = structlog.get_logger(__name__)

_ASSUMED = re.compile(r"arn:(?P<partition>aws[a-z-]*):sts::(?P<account>\d{12}):assumed-role/(?P<role>[^/]+)/.+")
REGION = "us-east-1"
"""Where none is configured."""
ANSWER_S = 5


def principal(endpoint_url: str | None, source: botocore.session.Session | None = None) -> str | None:
    """One call of STS. Of a role, the role's ARN and not the session's (without the role's path, which STS does not
    tell). None: there are no credentials, or STS does not take them or does not answer, which is logged.

    Args:
        source: has the control plane's credentials; default: botocore's usual places.
    """
    session = source or botocore.session.Session()
    if session.get_credentials() is None:
        return None
    config = Config(connect_timeout=ANSWER_S, read_timeout=ANSWER_S, retries={"total_max_attempts": 2})
    region = session.get_config_variable("region") or REGION
    try:
        sts = session.create_client("sts", region, endpoint_url=endpoint_url, config=config)
        arn = str(sts.get_caller_identity()["Arn"])
    except (ClientError, BotoCoreError) as e:
        log.warning("AWS does not tell who we are", why=str(e))
        return None
    assumed = _ASSUMED.fullmatch(arn)
    return arn if assumed is None else "arn:{partition}:iam::{account}:role/{role}".format(**assumed.groupdict())
