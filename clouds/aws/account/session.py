"""Credentials and clients: the customer's role, assumed under an external id, kept in memory only.

Each choice is measured: ``AssumeRole`` for 3600 s, the most that role chaining allows; with 900 s botocore would assume
the role again for every call. botocore renews the credentials 15 minutes before their end. One
botocore session and one client per service for each (role, region), since clients are safe between threads and a
session costs 260 ms and 11 MB.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.credentials import AssumeRoleCredentialFetcher, DeferredRefreshableCredentials
from botocore.exceptions import NoCredentialsError

from clouds.aws.account.errors import EXPIRED, BotoCoreError, ClientError, code_of, translated
from clouds.aws.account.throttle import MAX_WAIT_S, RateLimiter
from clouds.contract.errors import Throttled
from heliostat.models.clouds import AwsConfig

DURATION_S = 3600
SIGNER_S = 300
"""For so long at least the same credentials sign URLs."""
CONNECTIONS = 64
"""Of one client; at least the threads that use it (the worker's activities), or they wait for each other."""
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
"""RunInstances takes some seconds on a busy account."""

_NEXT_PAGE = {
    "ec2": ("NextToken", "NextToken"),
    "elbv2": ("Marker", "NextMarker"),
    "s3": ("ContinuationToken", "NextContinuationToken"),
    "iam": ("Marker", "Marker"),
}
"""What to give for the next page, and where the answer has it."""

_limiters: dict[tuple[str, str], RateLimiter] = {}
_limiters_lock = threading.Lock()


def _shared_limiter(account: str, region: str) -> RateLimiter:
    with _limiters_lock:
        return _limiters.setdefault((account, region), RateLimiter())


class AwsSession:
    """Calls into one account and region. Safe between threads.

    Args:
        config: names the role, the external id and the region.
        session_name: shown in the customer's CloudTrail beside every call: the installation's id.
        endpoint_url: for every service, STS included; default: AWS's own.
        source: has the control plane's own credentials; default: botocore's usual places.
        limiter: default: the one that all of this process share for the account and region.
    """

    def __init__(
        self,
        config: AwsConfig,
        session_name: str,
        *,
        endpoint_url: str | None = None,
        source: botocore.session.Session | None = None,
        limiter: RateLimiter | None = None,
    ) -> None:
        self.region, self.role_arn = config.region, config.role_arn
        self.account = config.role_arn.split(":")[4]
        self._external_id = config.external_id
        self._name = re.sub(r"[^\w+=,.@-]", "-", f"heliostat-{session_name}")[:64]
        self._endpoint_url = endpoint_url
        self._source = source
        self._limiter = limiter or _shared_limiter(self.account, self.region)
        self._lock = threading.Lock()
        self._session: boto3.Session | None = None
        self._clients: dict[str, Any] = {}
        self._signer: Any = None
        self._signer_ends = datetime.min.replace(tzinfo=UTC)

    def client(self, service: str) -> Any:
        """A boto3 client of the account, e.g. of ``ec2``; made once. Prefer ``call``, which translates errors."""
        with self._lock:
            if service not in self._clients:
                if self._session is None:
                    self._session = self._assumed()
                self._clients[service] = self._session.client(
                    service, endpoint_url=self._endpoint_url, config=_config(service)
                )
            return self._clients[service]

    def call(self, service: str, operation: str, resource: str | None = None, **arguments: Any) -> dict[str, Any]:
        """``operation`` (API name, e.g. ``RunInstances``) of ``service``. Throttling is met here, by the account's
        shared limiter; an expired session is renewed once.

        Args:
            resource: the id of ours that an error is about.

        Raises NoCapacity, QuotaExceeded, Throttled, BadConfig, Denied, Gone; any other CloudError may be tried again.
        """
        action = f"{service}:{operation}"
        deadline, renewed = self._limiter.deadline(MAX_WAIT_S), False
        while True:
            asked_at = self._limiter.wait(action, deadline)
            client = None
            try:
                client = self.client(service)
                answer: dict[str, Any] = _method(client, operation)(**arguments)
            except (ClientError, BotoCoreError) as e:
                if EXPIRED.fullmatch(code_of(e)) and not renewed:
                    renewed = True
                    self._forget(service, client)
                    continue
                error = translated(e, service, operation, resource, self.role_arn)
                if isinstance(error, Throttled):
                    self._limiter.refused(action, asked_at)
                    continue  # until the limiter says that the next turn is too late
                raise error from e
            self._limiter.taken(action)
            return answer

    def pages(
        self, service: str, operation: str, what: str, resource: str | None = None, **arguments: Any
    ) -> Iterator[Any]:
        """All items of the answer's list ``what``, page by page; the caller names their type."""
        ask, token_field = _NEXT_PAGE[service]
        while True:
            answer = self.call(service, operation, resource, **arguments)
            yield from answer.get(what, [])
            if not answer.get(token_field):
                return
            arguments[ask] = answer[token_field]

    def signer(self, lasts_s: float) -> Any:
        """A client of S3 to presign with. A URL ends with the credentials that signed it, whatever it says: these are
        not renewed under way, but new ones are taken when they would not last for ``lasts_s`` (55 minutes at most: so
        the role is assumed for this every 5 minutes at most). Raises as ``call`` does."""
        least = min(lasts_s, DURATION_S - SIGNER_S)
        with self._lock:
            if (self._signer_ends - datetime.now(UTC)).total_seconds() >= least:
                return self._signer
            try:
                _, make = self._own_client_maker()
                answer = make("sts").assume_role(RoleArn=self.role_arn, **self._arguments())["Credentials"]
            except (ClientError, BotoCoreError) as e:
                raise translated(e, "sts", "AssumeRole", None, self.role_arn) from e
            signing = botocore.session.Session()
            signing.register_component("data_loader", _loader())
            self._signer = signing.create_client(
                "s3",
                self.region,
                endpoint_url=self._endpoint_url,
                aws_access_key_id=answer["AccessKeyId"],
                aws_secret_access_key=answer["SecretAccessKey"],
                aws_session_token=answer["SessionToken"],
                config=_config("s3"),
            )
            self._signer_ends = answer["Expiration"]
            return self._signer

    def assume(self, external_id: str | None) -> dict[str, Any]:
        """STS's answer to one AssumeRole of the role under that external id, or under none; nothing is kept. Raises
        what botocore raises: ``cloud verify`` reads its headers."""
        _, make = self._own_client_maker()
        arguments = self._arguments() | {"ExternalId": external_id, "DurationSeconds": 900}
        given = {key: value for key, value in arguments.items() if value is not None}
        answer: dict[str, Any] = make("sts").assume_role(RoleArn=self.role_arn, **given)
        return answer

    def _arguments(self) -> dict[str, Any]:
        return {"ExternalId": self._external_id, "RoleSessionName": self._name, "DurationSeconds": DURATION_S}

    def _own_client_maker(self) -> tuple[Any, Callable[..., Any]]:
        """The control plane's own credentials, and what makes clients with them."""
        source = self._source or botocore.session.Session()
        own = source.get_credentials()
        if own is None:
            raise NoCredentialsError()
        make = functools.partial(source.create_client, region_name=self.region, endpoint_url=self._endpoint_url)
        return own, _configured(make)

    def _assumed(self) -> boto3.Session:
        own, make = self._own_client_maker()
        fetcher = AssumeRoleCredentialFetcher(make, own, self.role_arn, extra_args=self._arguments(), cache={})
        assumed = botocore.session.Session()
        assumed.register_component("data_loader", _loader())
        # Private, but the only way without a profile on disk; pinned by tests/clouds/aws/account/test_session.py.
        assumed._credentials = DeferredRefreshableCredentials(
            refresh_using=fetcher.fetch_credentials, method="assume-role"
        )
        return boto3.Session(botocore_session=assumed, region_name=self.region)

    def _forget(self, service: str, used: Any) -> None:
        """Drops the credentials and clients, unless another thread has done so since ``used`` was made."""
        with self._lock:
            if self._clients.get(service) is used:
                self._session, self._clients = None, {}


@functools.cache
def _loader() -> Any:
    """The descriptions of AWS's services, parsed once for all sessions: most of a session's 260 ms and 11 MB."""
    return botocore.session.Session().get_component("data_loader")


def _configured(make: Callable[..., Any]) -> Callable[..., Any]:
    def create(service: str, **arguments: Any) -> Any:
        return make(service, **(arguments | {"config": _config(service)}))

    return create


def _config(service: str) -> Config:
    """EC2 and ELBv2 are tried once here: what may be tried again is tried by the limiter (throttling), by the activity,
    or elsewhere (InsufficientInstanceCapacity is a 500 to botocore, which would insist)."""
    return Config(
        retries={"mode": "standard", "total_max_attempts": 1 if service in ("ec2", "elbv2") else 3},
        max_pool_connections=CONNECTIONS,
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        signature_version="s3v4" if service == "s3" else None,
        # The region's own host: presigned for the global one, a URL of a new bucket would be a redirect. With a dotted
        # bucket, or an endpoint that is an IP address, botocore takes the path instead.
        s3={"addressing_style": "virtual"},
    )


def _snake(operation: str) -> str:
    return str(botocore.xform_name(operation))


def _method(client: Any, operation: str) -> Callable[..., dict[str, Any]]:
    method: Callable[..., dict[str, Any]] = getattr(client, _snake(operation))
    return method
