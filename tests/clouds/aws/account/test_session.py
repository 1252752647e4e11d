"""Credentials, errors and back-off, by real boto3 against moto."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import botocore.credentials
import botocore.session
import pytest

from clouds.aws.account import session as sessions
from clouds.aws.account.session import AwsSession
from clouds.aws.account.throttle import FIRST_GAP_S, MAX_WAIT_S, RateLimiter
from clouds.contract.errors import Denied, NoCapacity, QuotaExceeded, Throttled
from heliostat.errors import CloudError
from tests.clouds.aws.moto_plus import KNOBS, Fault
from tests.clouds.aws.support import EXTERNAL_ID, Account


class Clock:
    """Time that passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds
            self.slept.append(seconds)


def counted(action: str, since: int) -> int:
    return Counter(call.get("Action") for call in KNOBS.calls[since:])[action]


@pytest.mark.long
def test_the_role_is_assumed_once_for_many_threads(aws_account: Account) -> None:
    session, since = aws_account.session(), len(KNOBS.calls)
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda _: session.call("ec2", "DescribeVpcs", VpcIds=[aws_account.config.vpc_id]), range(16))
        )
    assert all(len(a["Vpcs"]) == 1 for a in answers)
    assert counted("AssumeRole", since) == 1
    asked = next(c for c in KNOBS.calls[since:] if c.get("Action") == "AssumeRole")
    assert asked["ExternalId"] == EXTERNAL_ID
    assert asked["DurationSeconds"] == "3600", "with 900 botocore assumes anew for every call"
    assert asked["RoleSessionName"] == "heliostat-installation-of-this-test"
    assert session.client("ec2") is session.client("ec2")


def test_credentials_are_renewed_before_their_end(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    session, since = aws_account.session(), len(KNOBS.calls)
    session.call("ec2", "DescribeVpcs")
    held = session.client("ec2")._request_signer._credentials
    first = held.access_key
    late = lambda: datetime.now(UTC) + timedelta(minutes=50)  # noqa: E731
    monkeypatch.setattr(botocore.credentials, "_local_now", late)
    monkeypatch.setattr(held, "_time_fetcher", late)
    session.call("ec2", "DescribeVpcs")
    assert counted("AssumeRole", since) == 2
    monkeypatch.undo()  # moto's clock is the real one
    assert held.access_key != first


@pytest.mark.parametrize("external_id", ["another-organizations", "heliostat-org-11"])
def test_another_external_id_is_denied_across_accounts(aws_account: Account, external_id: str) -> None:
    with pytest.raises(Denied) as caught:
        aws_account.session(external_id=external_id).call("ec2", "DescribeVpcs")
    assert aws_account.config.role_arn in caught.value.message
    assert "external id" in caught.value.remedy
    assert '"Action": "sts:AssumeRole"' in caught.value.remedy
    assert external_id not in str(caught.value)


def test_a_role_that_does_not_exist(aws_account: Account) -> None:
    with pytest.raises(Denied, match="role/nobody"):
        aws_account.session(role_arn=f"arn:aws:iam::{aws_account.id}:role/nobody").call("ec2", "DescribeVpcs")


def test_no_credentials_of_our_own(aws_account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    source = botocore.session.Session()
    monkeypatch.setattr(source, "get_credentials", lambda: None)
    session = AwsSession(aws_account.config, "x", endpoint_url=aws_account.url, source=source, limiter=RateLimiter())
    with pytest.raises(Denied, match="no AWS credentials of its own"):
        session.call("ec2", "DescribeVpcs")


@pytest.mark.parametrize("code", ["InvalidClientTokenId", "RegionDisabledException"])
def test_a_region_that_our_own_account_has_not_enabled(aws_account: Account, code: str) -> None:
    """STS says it so; the role's trust is not at fault."""
    KNOBS.faults.append(Fault("AssumeRole", code, 403, "The security token included in the request is invalid."))
    with pytest.raises(Denied, match="own credentials in this region") as caught:
        aws_account.session().call("ec2", "DescribeVpcs")
    assert "enabled in the control plane's account" in caught.value.remedy
    assert "trust policy" not in caught.value.remedy


def test_an_expired_session_is_renewed_once(aws_account: Account) -> None:
    session, since = aws_account.session(), len(KNOBS.calls)
    session.call("ec2", "DescribeVpcs")
    KNOBS.faults.append(Fault("DescribeVpcs", "RequestExpired"))
    assert session.call("ec2", "DescribeVpcs")["Vpcs"]
    assert counted("AssumeRole", since) == 2
    KNOBS.faults.append(Fault("DescribeVpcs", "RequestExpired", times=2))
    with pytest.raises(CloudError, match="clock"):
        session.call("ec2", "DescribeVpcs")


def test_a_missing_right_is_named_with_the_line_that_grants_it(aws_account: Account) -> None:
    node = "arn:aws:iam::1:role/heliostat-node"
    message = (
        "You are not authorized to perform this operation. User: arn:aws:sts::1:assumed-role/h/x is not "
        f"authorized to perform: iam:PassRole on resource: {node} because no identity-based policy allows the "
        "iam:PassRole action. "
        "Encoded authorization failure message: AbCdEf123"
    )
    KNOBS.faults.append(Fault("RunInstances", "UnauthorizedOperation", 403, message))
    with pytest.raises(Denied) as caught:
        aws_account.session().call("ec2", "RunInstances", "nod_1", MinCount=1, MaxCount=1)
    assert caught.value.details["action"] == "iam:PassRole"
    assert f'{{"Effect": "Allow", "Action": "iam:PassRole", "Resource": "{node}"}}' in caught.value.remedy
    assert "AbCdEf123" not in str(caught.value)
    assert caught.value.resource == "nod_1"
    KNOBS.faults.append(Fault("DescribeLoadBalancers", "AccessDenied", 403, "no"))
    with pytest.raises(Denied) as caught:
        aws_account.session().call("elbv2", "DescribeLoadBalancers")
    assert '"Action": "elasticloadbalancing:DescribeLoadBalancers"' in caught.value.remedy


def test_throttling_is_met_and_met_once(aws_account: Account) -> None:
    clock = Clock()
    session, since = aws_account.session(limiter=RateLimiter(clock, clock.sleep)), len(KNOBS.calls)
    KNOBS.faults.append(Fault("DescribeVpcs", "RequestLimitExceeded", 503, times=3))
    assert session.call("ec2", "DescribeVpcs")["Vpcs"]
    assert counted("DescribeVpcs", since) == 4, "botocore does not try by itself beside us"
    assert clock.slept == pytest.approx([FIRST_GAP_S, 2 * FIRST_GAP_S, 4 * FIRST_GAP_S])


def test_throttling_that_does_not_end_is_told_in_time(aws_account: Account) -> None:
    clock = Clock()
    session = aws_account.session(limiter=RateLimiter(clock, clock.sleep))
    KNOBS.faults.append(Fault("DescribeVpcs", "RequestLimitExceeded", 503, times=1e9))
    began = clock.now
    with pytest.raises(Throttled, match="DescribeVpcs"):
        session.call("ec2", "DescribeVpcs")
    assert clock.now - began <= MAX_WAIT_S
    KNOBS.faults.clear()
    clock.now += 10
    assert session.call("ec2", "DescribeVpcs")["Vpcs"]


def test_all_of_an_account_wait_in_one_line() -> None:
    clock = Clock()
    limiter = RateLimiter(clock, clock.sleep)
    asked = [limiter.wait("ec2:RunInstances", clock() + 60) for _ in range(20)]
    assert clock.slept == [], "no limit until AWS says so"
    for at in asked:
        limiter.refused("ec2:RunInstances", at)
    turns = [limiter.wait("ec2:RunInstances", clock() + 60) for _ in range(4)]
    gaps = [b - a for a, b in itertools.pairwise(turns)]
    assert gaps == pytest.approx([FIRST_GAP_S] * 3), "a burst that was refused counts once"
    limiter.wait("ec2:DescribeInstances", clock())  # another action's bucket is another
    for _ in range(40):
        limiter.taken("ec2:RunInstances")
    slept = len(clock.slept)
    clock.now += 1
    for _ in range(5):
        limiter.wait("ec2:RunInstances", clock())
    assert len(clock.slept) == slept, "it recovers"


def test_the_limiter_is_shared_by_the_sessions_of_an_account(aws_account: Account) -> None:
    source = botocore.session.Session()
    source.set_credentials("AKIACONTROLPLANE0000", "secret")
    a, b = (AwsSession(aws_account.config, "x", endpoint_url=aws_account.url, source=source) for _ in range(2))
    assert a._limiter is b._limiter is sessions._shared_limiter(aws_account.id, "us-west-2")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("InsufficientInstanceCapacity", NoCapacity),
        ("InsufficientFreeAddressesInSubnet", NoCapacity),
        ("VcpuLimitExceeded", QuotaExceeded),
        ("TooManyTargetGroups", QuotaExceeded),
        ("TooManyRequestsException", Throttled),
    ],
)
def test_codes(aws_account: Account, code: str, expected: type[CloudError]) -> None:
    clock = Clock()
    KNOBS.faults.append(Fault("DescribeVpcs", code, 500, times=1e9))
    since = len(KNOBS.calls)
    with pytest.raises(expected) as caught:
        aws_account.session(limiter=RateLimiter(clock, clock.sleep)).call("ec2", "DescribeVpcs")
    assert type(caught.value) is expected
    assert caught.value.remedy
    if expected is not Throttled:
        assert counted("DescribeVpcs", since) == 1, "botocore would try a 500 again"


def test_nobody_answers(aws_account: Account) -> None:
    source = botocore.session.Session()
    source.set_credentials("a", "b")
    session = AwsSession(
        aws_account.config, "x", endpoint_url="http://127.0.0.1:9", source=source, limiter=RateLimiter()
    )
    began = time.monotonic()
    with pytest.raises(CloudError, match="region's name") as caught:
        session.call("ec2", "DescribeVpcs")
    assert type(caught.value) is CloudError
    assert time.monotonic() - began < 20
