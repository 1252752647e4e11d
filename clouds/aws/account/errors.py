"""Maps errors of AWS to those of ``clouds.contract``, in one table.

Codes are EC2's (https://docs.aws.amazon.com/AWSEC2/latest/APIReference/errors-overview.html), ELBv2's, S3's, SSM's and
STS's "Errors" sections of their API references. A code that is in no row may be tried again.
"""

from __future__ import annotations

import json
import re

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    InvalidRegionError,
    NoCredentialsError,
    ParamValidationError,
)

from clouds.contract.errors import BadConfig, Denied, Gone, NoCapacity, QuotaExceeded, Throttled
from heliostat.errors import CloudError

_ROWS: tuple[tuple[type[CloudError], str], ...] = (
    (
        NoCapacity,
        # Addresses: a subnet is of one zone, so another zone is another subnet.
        r"Insufficient\w*Capacity\w*|Insufficient\w*Address\w*|SpotMaxPriceTooLow|UnfulfillableCapacity"
        r"|ReservationCapacityExceeded",
    ),
    (
        QuotaExceeded,
        r"\w*LimitExceeded|MaxSpotInstanceCountExceeded|ResourceCountExceeded|TooMany(?!Requests)\w+|QuotaExceeded"
        r"|ServiceQuotaExceeded\w*",
    ),
    (
        Throttled,
        r"RequestLimitExceeded|Throttl\w+|TooManyRequests\w*|RequestThrottled\w*|EC2ThrottledException|SlowDown"
        r"|BandwidthLimitExceeded|PriorRequestNotComplete|ConcurrentTagAccess",
    ),
    (
        Gone,
        r"InvalidInstanceID\.NotFound|LoadBalancerNotFound|TargetGroupNotFound|ListenerNotFound|RuleNotFound"
        r"|NoSuchKey|NoSuchUpload|404",
    ),
    (
        Denied,
        r"UnauthorizedOperation|Client\.UnauthorizedOperation|AccessDenied\w*|AuthFailure[\w.]*|Blocked|OptInRequired"
        r"|InvalidClientTokenId|UnrecognizedClientException|InvalidAccessKeyId|AllAccessDisabled|403"
        r"|RegionDisabled\w*",
    ),
    (
        BadConfig,
        r"Invalid\w*[.\w]*|Malformed[.\w]*|MissingParameter|UnknownParameter\w*|Unsupported\w*|VPCIdNotSpecified"
        r"|VcpuLimitNotSupported|Idempotent\w+|ParameterNotFound|ParameterVersionNotFound|NoSuchBucket|NoSuchEntity"
        r"|ValidationError|Duplicate\w+|SubnetNotFound|SubnetsNotFound|CertificateNotFound|IncompatibleProtocols"
        r"|PermanentRedirect|AuthorizationHeaderMalformed|EntityToo\w+|BadDigest|ResourceNotFoundException|400",
    ),
)

EXPIRED = re.compile(r"ExpiredToken\w*|RequestExpired|TokenRefreshRequired|InvalidToken")
"""The session of the role has ended, or our clock is wrong: new credentials are requested, once."""
SKEWED = re.compile(r"RequestTimeTooSkewed|SignatureDoesNotMatch|InvalidSignature\w*|IncompleteSignature")

_FIRST = {  # codes that a wider row would take
    "RequestLimitExceeded": Throttled,
    "BandwidthLimitExceeded": Throttled,
    "InvalidInstanceID.NotFound": Gone,
    "InvalidClientTokenId": Denied,
    "InvalidAccessKeyId": Denied,
}

_REMEDIES: dict[type[CloudError], str] = {
    NoCapacity: "Try another zone, type or market, or wait.",
    QuotaExceeded: "Wait until other resources are gone, or raise the account's quota (AWS console, Service Quotas).",
    Throttled: "Try again later.",
    Gone: "It no longer exists.",
    BadConfig: "Change the cloud's or the compute config.",
}

_OURS_NOT_TAKEN = ("InvalidClientTokenId", "UnrecognizedClientException", "RegionDisabledException")
"""Of AssumeRole: the region rejects the caller's credentials; the role was not asked."""
_NOT_AUTHORIZED = re.compile(r"not authorized to perform: (?P<action>[\w-]+:\w+)(?: on resource: (?P<resource>\S+))?")
_ENCODED = re.compile(r"\s*Encoded authorization failure message: \S+")


def classify(code: str) -> type[CloudError]:
    """The class of a vendor's code; ``CloudError`` itself may be tried again."""
    if code in _FIRST:
        return _FIRST[code]
    return next((cls for cls, pattern in _ROWS if re.fullmatch(pattern, code)), CloudError)


def code_of(error: Exception) -> str:
    """The vendor's code, "" for an error without one."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def translated(error: Exception, service: str, operation: str, resource: str | None, role_arn: str) -> CloudError:
    """What botocore raised at ``service``'s ``operation``, as one of ours, with what to do about it."""
    if isinstance(error, ClientError):
        if error.operation_name == "AssumeRole":
            return _not_assumed(error, role_arn)
        return _said(error, service, operation, resource)
    if isinstance(error, NoCredentialsError):
        return Denied(
            "The control plane has no AWS credentials of its own to assume roles with.",
            remedy="Run it with an instance profile, a web identity, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
            resource=resource,
        )
    if isinstance(error, ParamValidationError | InvalidRegionError):
        return BadConfig(f"{service}:{operation} rejected the arguments: {error}", resource=resource)
    unreachable = isinstance(error, EndpointConnectionError)
    return CloudError(
        f"AWS did not answer {service}:{operation}: {error}",
        remedy="Is the region's name right, and has this host a route to AWS? The call is safe to repeat."
        if unreachable
        else "The call is safe to repeat.",
        resource=resource,
    )


def _said(error: ClientError, service: str, operation: str, resource: str | None) -> CloudError:
    code, message = code_of(error), _ENCODED.sub("", str(error.response.get("Error", {}).get("Message", "")))
    said = f"AWS refused {service}:{operation} ({code}): {message}"
    if EXPIRED.fullmatch(code) or SKEWED.fullmatch(code):
        return CloudError(
            said,
            remedy="Is this host's clock right (AWS takes 5 minutes of skew)? Credentials are renewed at the next try.",
            resource=resource,
            details={"code": code},
        )
    cls = classify(code)
    if cls is Denied:
        return _denied(said, code, message, service, operation, resource)
    remedy = _REMEDIES.get(cls, "The call is safe to repeat.")
    return cls(said, remedy=remedy, resource=resource, details={"code": code})


def _denied(said: str, code: str, message: str, service: str, operation: str, resource: str | None) -> Denied:
    """Names the missing action and the line that grants it."""
    found = _NOT_AUTHORIZED.search(message)
    action = found["action"] if found else action_of(service, operation)
    line = policy_line(action, (found["resource"] or "*").rstrip(".") if found else "*")
    remedy = f"Add to the policy of the role that the control plane assumes: {line}"
    if code.startswith("AuthFailure") and "ServiceLinkedRole" in code:
        action = "iam:CreateServiceLinkedRole"
        remedy = "Run once in the account: aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
    elif code == "OptInRequired":
        remedy = "Accept the image's terms in AWS Marketplace, with this account."
    elif code in ("InvalidClientTokenId", "InvalidAccessKeyId", "UnrecognizedClientException", "AuthFailure"):
        remedy = "The credentials are not valid in this account or region: is the region enabled in it?"
    return Denied(said, remedy=remedy, resource=resource, details={"code": code, "action": action})


def _not_assumed(error: ClientError, role_arn: str) -> CloudError:
    """AssumeRole's own refusal. AWS does not say whether the role, its trust or the external id is wrong."""
    code = code_of(error)
    if classify(code) is Throttled:
        return Throttled(f"AWS throttles sts:AssumeRole ({code}).", remedy="Try again later.")
    if classify(code) is not Denied:
        return _said(error, "sts", "AssumeRole", role_arn)
    if code in _OURS_NOT_TAKEN:
        return Denied(
            f"AWS does not take the control plane's own credentials in this region ({code}).",
            remedy="Are they valid? A region that AWS does not enable by itself must be enabled in the control plane's "
            "account as well as in the role's (https://docs.aws.amazon.com/IAM/latest/UserGuide/"
            "id_credentials_temp_enable-regions.html).",
            resource=role_arn,
            details={"code": code, "action": "sts:AssumeRole"},
        )
    return Denied(
        f"AWS does not let the control plane assume {role_arn} ({code}).",
        remedy="In the role's trust policy the principal must be the control plane's account or role, and the "
        "condition sts:ExternalId the cloud's external id; does the role exist? The control plane's own identity needs "
        + policy_line("sts:AssumeRole", role_arn),
        resource=role_arn,
        details={"code": code, "action": "sts:AssumeRole"},
    )


def action_of(service: str, operation: str) -> str:
    """IAM's name of a call's right."""
    prefix = {"elbv2": "elasticloadbalancing"}.get(service, service)
    renamed = {"HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "DeleteObjects": "DeleteObject"}
    return f"{prefix}:{renamed.get(operation, operation) if service == 's3' else operation}"


def policy_line(action: str, resource: str) -> str:
    return json.dumps({"Effect": "Allow", "Action": action, "Resource": resource})


__all__ = ["BotoCoreError", "ClientError", "EXPIRED", "action_of", "classify", "code_of", "policy_line", "translated"]
