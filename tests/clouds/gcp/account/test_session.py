"""Who we are to Google: our own token, exchanged at an STS that really checks it."""

from __future__ import annotations

import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions
from google.auth import jwt
from pydantic import ValidationError

from clouds.contract.errors import BadConfig, Denied, Gone, NoCapacity, QuotaExceeded, Throttled
from clouds.gcp.account import errors, oidc
from clouds.gcp.account.oidc import Issuer
from clouds.gcp.account.session import Endpoints, Sessions
from clouds.gcp.account.throttle import PATIENCE_S, Backoff
from clouds.gcp.machines.combined import Combined
from clouds.gcp.machines.compute_engine import GcpMachines
from heliostat.errors import CloudError, Unavailable
from tests.clouds.gcp.support import ACCOUNT, PROVIDER, config, served
from tests.clouds.support import OURS
from tests.lab.gce import GceFake

pytestmark = pytest.mark.long  # hundreds of calls to the fake of the whole cloud

ISSUER_URL = "https://heliostat.acme.example"


@pytest.fixture(scope="module")
def pem() -> bytes:
    return oidc.new_key()


@pytest.fixture
def trusting(pem: bytes) -> tuple[GceFake, str, Issuer]:
    """A project whose provider trusts our issuer for the organization ``org_1``."""
    issuer = Issuer(ISSUER_URL, pem)
    fake = GceFake()
    auth = fake.auth
    auth.jwks, auth.issuer, auth.organization = issuer.jwks(), issuer.url, "org_1"
    auth.audience = f"//iam.googleapis.com/{PROVIDER}"
    auth.add_account(ACCOUNT)
    return fake, served(fake), issuer


def listed(url: str, issuer: Issuer, organization: str = "org_1", **fields: Any) -> list[Any]:
    session = Sessions(issuer, OURS, Endpoints.fake(url)).get(config(**fields), organization)
    return GcpMachines(config(**fields), session, OURS).list_owned(OURS)


def test_a_token_says_who_asks(pem: bytes) -> None:
    issuer = Issuer(ISSUER_URL + "/", pem, clock=lambda: 1_000_000)
    header, claims, _, _ = jwt._unverified_decode(issuer.token("//aud", "heliostat:x", "org_1"))
    assert claims == {
        "iss": ISSUER_URL,
        "aud": "//aud",
        "sub": "heliostat:x",
        "org": "org_1",
        "iat": 999_970,
        "nbf": 999_970,
        "exp": 1_000_570,
    }
    assert (header["alg"], header["kid"]) == ("RS256", issuer.jwks()["keys"][0]["kid"])
    assert set(issuer.jwks()["keys"][0]) == {"kty", "alg", "use", "n", "e", "kid"}, "nothing of the private key"
    discovery = issuer.discovery()
    assert discovery["issuer"] == ISSUER_URL
    assert discovery["jwks_uri"].startswith(ISSUER_URL)


def test_the_key_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "oidc.pem"
    with ThreadPoolExecutor(4) as pool:
        keys = set(pool.map(lambda _: oidc.load_or_create_key(path), range(4)))
    assert len(keys) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["oidc.pem"]
    path.chmod(0o644)
    with pytest.raises(Unavailable, match="read by others"):
        oidc.load_or_create_key(path)


def test_calls_are_made_as_the_customers_account(trusting: tuple[GceFake, str, Issuer]) -> None:
    fake, url, issuer = trusting
    sessions = Sessions(issuer, OURS, Endpoints.fake(url))
    session = sessions.get(config(), "org_1")
    assert sessions.get(config(), "org_1") is session
    assert sessions.get(config(region="europe-west4", zones=["europe-west4-a"]), "org_1") is session
    assert sessions.get(config(), "org_2") is not session, "another organization says so, and is refused by Google"
    assert sessions.get(config(), "org_2").backoff is session.backoff, "back-off is the project's"
    ours = GcpMachines(config(), session, OURS)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: ours.list_owned(OURS), range(16))) == [[]] * 16
    assert fake.auth.calls == {"token": 1, "generateAccessToken": 1}, "one token for all"
    session.credentials.expiry = session.credentials._inner.expiry = None
    session.credentials.token = "forgotten"
    fake.auth.valid.clear()
    assert ours.list_owned(OURS) == [], "a token that is refused is renewed once"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"organization": "org_other"}, "attribute condition"),
        ({"issuer": "https://somebody.else"}, "issuer"),
        ({"audience": "//iam.googleapis.com/other"}, "audience"),
        ({"jwks": {"keys": []}}, "kid"),
        ({"accounts": {}}, "iam.serviceAccounts.getAccessToken"),
    ],
)
def test_who_is_not_trusted_is_told_why(
    trusting: tuple[GceFake, str, Issuer], change: dict[str, object], word: str
) -> None:
    fake, url, issuer = trusting
    for name, value in change.items():
        setattr(fake.auth, name, value)
    with pytest.raises(Denied, match=word) as caught:
        listed(url, issuer)
    assert caught.value.remedy
    assert "eyJ" not in str(caught.value), "no token in an error"


def test_a_clock_that_is_wrong(trusting: tuple[GceFake, str, Issuer], pem: bytes) -> None:
    _, url, _ = trusting
    with pytest.raises(Denied, match="stale"):
        listed(url, Issuer(ISSUER_URL, pem, clock=lambda: time.time() - 3600))


@pytest.mark.parametrize(
    "fields",
    [
        {"workload_identity_provider": PROVIDER.replace("providers/", "providers@evil.example/")},
        {"workload_identity_provider": "https://evil.example/x"},
        {"service_account": "x@evil.example"},
        {"service_account": "x/../y@acme-prod-1.iam.gserviceaccount.com"},
        {"project": "../other"},
        {"region": "us-central1?x"},
        {"zones": ["europe-west4-a"]},
        {"zones": []},
        {"bucket": "a/b"},
        {"credentials": {"type": "external_account", "token_url": "http://169.254.169.254/"}},
    ],
)
def test_what_a_customer_writes_names_no_host(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        config(**fields)


def test_the_table_of_errors() -> None:
    cases = [
        ("ZONE_RESOURCE_POOL_EXHAUSTED", 503, NoCapacity),
        ("QUOTA_EXCEEDED", 403, QuotaExceeded),
        ("quotaExceeded", 403, QuotaExceeded),
        ("rateLimitExceeded", 403, Throttled),
        ("RESOURCE_OPERATION_RATE_EXCEEDED", 400, Throttled),
        ("", 429, Throttled),
        ("forbidden", 403, Denied),
        ("notFound", 404, Gone),
        ("invalid", 400, BadConfig),
        ("resourceNotReady", 400, errors.InUse),
        ("backendError", 503, CloudError),
        ("never heard of", 500, CloudError),
    ]
    for code, status, expected in cases:
        assert errors.classify(code, status) is expected, code
        e = errors.error(code, status, "text", "do it")
        assert type(e) is expected
        assert e.remedy
    disabled = (
        "Compute Engine API has not been used in project 1 before. Visit https://x/apis/api/compute.googleapis.com/"
    )
    assert "compute.googleapis.com" in errors.error("accessNotConfigured", 403, disabled, "do it").remedy
    for text, missing in [
        ("Required 'compute.instances.create' permission for 'projects/p/x'", "compute.instances.create"),
        ("Permission 'iam.serviceAccounts.signBlob' denied on resource", "iam.serviceAccounts.signBlob"),
        ("a@b.c does not have storage.objects.get access to the object.", "storage.objects.get"),
    ]:
        assert errors.error("forbidden", 403, text, "do it").details["permission"] == missing
    with pytest.raises(TypeError):
        errors.raised(ValueError("ours"), "do it")
    assert type(errors.raised(exceptions.ServiceUnavailable("x"), "do it")) is CloudError


def test_back_off_is_shared() -> None:
    now, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    backoff = Backoff(clock=lambda: now[0], sleep=sleep)
    first, second = backoff.wait("a"), backoff.wait("b")
    assert slept == []
    backoff.refused(first)
    backoff.refused(second)
    backoff.wait("c")
    assert len(slept) == 1
    assert 0.5 <= slept[0] <= 1.0, "those of one burst count once"
    for _ in range(6):
        now[0] += 0.001
        backoff.refused(now[0])
    with pytest.raises(Throttled, match="throttles"):
        backoff.wait("d")
    assert max(slept) <= PATIENCE_S
    now[0] += 100
    backoff.taken(backoff.wait("e"))
    before = len(slept)
    backoff.wait("f")
    assert len(slept) == before


def test_questions_go_together() -> None:
    asked: list[list[str]] = []
    go = threading.Event()

    def ask(keys: list[str]) -> dict[str, str]:
        asked.append(keys)
        go.wait(10)
        if "bad" in keys:
            raise CloudError("no")
        return {key: key.upper() for key in keys if key != "none"}

    combined = Combined(ask, most=3)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(combined.get, ["a"])
        while not asked:
            time.sleep(0.001)
        later = [pool.submit(combined.get, keys) for keys in (["b", "c"], ["c", "d"], ["none", "e"])]
        while combined._next is None or len(combined._next.keys) < 5:
            time.sleep(0.001)
        go.set()
        assert first.result() == {"a": "A"}
        assert [f.result() for f in later] == [{"b": "B", "c": "C"}, {"c": "C", "d": "D"}, {"e": "E"}]
    assert asked == [["a"], ["b", "c", "d"], ["e", "none"]]
    with pytest.raises(CloudError):
        combined.get(["bad"])
    assert combined.get(["x"]) == {"x": "X"}, "a failure is of that question alone"
    assert combined.get([]) == {}
