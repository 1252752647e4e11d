"""Who we are to Google Cloud, and one way to call it: a project's credentials, clients and shared back-off.

Nothing is stored: our own OIDC token (``clouds.gcp.account.oidc``) is exchanged at Google's STS (workload identity
federation), and the result acts as the customer's service account for an hour at most. Everything is built from the
checked fields of ``GcpConfig``. A customer's credential JSON is never taken, since google-auth sends our token
to whatever URL stands in it, and ``google.auth.load_credentials_from_*`` is never called, since it calls hosts of its
own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import requests
from google.api_core.exceptions import GoogleAPICallError
from google.auth import identity_pool
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession

from clouds.contract.errors import Throttled
from clouds.gcp.account import errors
from clouds.gcp.account.oidc import Issuer
from clouds.gcp.account.throttle import Backoff
from heliostat.models.clouds import GcpConfig

SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
"""What we may do is decided by IAM roles; narrower scopes would only be a second place to look."""
TOKEN_LIFETIME_S = 3600
CALL_S = 20.0
"""Seconds for an answer. An insert answers within one or two; what takes longer is an operation, which is asked
about."""

RAISED = (GoogleAPICallError, GoogleAuthError, requests.RequestException)


@dataclass(frozen=True)
class Endpoints:
    """Google's hosts. Only tests have others."""

    compute: str = "https://compute.googleapis.com"
    storage: str = "https://storage.googleapis.com"
    sts: str = "https://sts.googleapis.com/v1/token"
    iam: str = "https://iamcredentials.googleapis.com"
    projects: str = "https://cloudresourcemanager.googleapis.com"
    accounts: str = "https://iam.googleapis.com"

    @classmethod
    def fake(cls, url: str) -> Endpoints:
        """All of them at one address."""
        return cls(compute=url, storage=url, sts=f"{url}/v1/token", iam=url, projects=url, accounts=url)


class _Supplier(identity_pool.SubjectTokenSupplier):  # type: ignore[misc] # google-auth is not read by mypy
    """Gives google-auth a fresh token of ours whenever it wants one."""

    def __init__(self, token: Callable[[str], str]) -> None:
        self._token = token

    def get_subject_token(self, context: Any, request: Any) -> str:
        return self._token(context.audience)


class Federated(Credentials):  # type: ignore[misc]
    """An access token of the customer's service account, refreshed by one thread at a time.

    google-auth's own external-account credentials look up "regional access boundaries" at a fixed host from a thread of
    their own before a call (google-auth 2.62); for tokens alone, as here, they do not.

    Args:
        config: names the provider and the service account.
        subject_token: gives our token for an audience.
        endpoints: Google's.
    """

    def __init__(self, config: GcpConfig, subject_token: Callable[[str], str], endpoints: Endpoints) -> None:
        super().__init__()
        self.token: str | None = None
        self.expiry: Any = None
        self._refreshing = threading.Lock()
        account = f"{endpoints.iam}/v1/projects/-/serviceAccounts/{config.service_account}:generateAccessToken"
        self._made = functools.partial(
            identity_pool.Credentials,
            audience=f"//iam.googleapis.com/{config.workload_identity_provider}",
            subject_token_type="urn:ietf:params:oauth:token-type:jwt",
            token_url=endpoints.sts,
            subject_token_supplier=_Supplier(subject_token),
            service_account_impersonation_url=account,
            service_account_impersonation_options={"token_lifetime_seconds": TOKEN_LIFETIME_S},
            scopes=SCOPES,
        )
        self._inner = self._made()

    def refresh(self, request: Any) -> None:
        """Raises google.auth's RefreshError."""
        before = self.token
        with self._refreshing:
            if self.token is before:  # else another thread has done it while we waited
                self._inner.refresh(request)
            self.token, self.expiry = self._inner.token, self._inner.expiry

    def prove(self, request: Any) -> None:
        """``refresh`` from the beginning: google-auth keeps the exchanged token for its hour, and a trust that was
        broken meanwhile would not show. Raises google.auth's RefreshError."""
        inner = self._made()
        inner.refresh(request)
        with self._refreshing:
            self._inner, self.token, self.expiry = inner, inner.token, inner.expiry


class Session:
    """One project, as one service account. Safe from several threads.

    Args:
        project: its id.
        service_account: whom we act as, by e-mail.
        credentials: what calls are signed with.
        endpoints: Google's, or a fake's.
        backoff: shared by all who call this project.
    """

    def __init__(
        self,
        project: str,
        service_account: str,
        credentials: Credentials,
        endpoints: Endpoints | None = None,
        backoff: Backoff | None = None,
    ) -> None:
        self.project, self.service_account, self.credentials = project, service_account, credentials
        self.endpoints, self.backoff = endpoints or Endpoints(), backoff or Backoff()
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}
        self._local = threading.local()

    @functools.cached_property
    def types(self) -> Any:
        """``google.cloud.compute_v1``. Imported when it is first used: it takes 2 s and 150 MB."""
        from google.cloud import compute_v1

        return compute_v1

    def client(self, name: str) -> Any:
        """The client of that name, e.g. ``Instances``; one of each kind. Their ``*_unary`` methods only: the others'
        ``result()`` asks compute.googleapis.com, whatever the endpoint."""
        with self._lock:
            if name not in self._clients:
                make = getattr(self.types, f"{name}Client")
                self._clients[name] = make(
                    credentials=self.credentials, client_options={"api_endpoint": self.endpoints.compute}
                )
            return self._clients[name]

    def call(self, client: str, method: str, request: dict[str, Any], doing: str, resource: str | None = None) -> Any:
        """One call of Compute Engine; a list is read to its end.

        Args:
            client, method: e.g. ``Instances``, ``insert_unary``.
            request: the fields of the method's request; ``project`` is added.
            doing: what for, after "refused to" and "asked to".

        Raises what ``clouds.gcp.account.errors`` makes of it. Nothing is tried again here: the caller's
        activity does."""
        target = getattr(self.client(client), method)

        def ask() -> Any:
            # retry=None: the client's own would go on for ten minutes on 503, in silence.
            answer = target(request={"project": self.project, **request}, retry=None, timeout=CALL_S)
            return list(answer) if hasattr(answer, "pages") else answer

        return self._paced(ask, doing, resource)

    def http(self, method: str, url: str, doing: str, resource: str | None = None, **options: Any) -> requests.Response:
        """One HTTP call with our token; any answer below 400, and 404 too. Raises as ``call`` does."""

        def ask() -> requests.Response:
            options.setdefault("timeout", CALL_S)
            return self._authorized().request(method, url, **options)

        response: requests.Response = self._paced(ask, doing, resource)
        if response.status_code >= 400 and response.status_code != 404:
            raise errors.answered(response, doing, resource)
        return response

    def _paced(self, ask: Callable[[], Any], doing: str, resource: str | None) -> Any:
        asked_at = self.backoff.wait(doing)
        try:
            answer = ask()
        except RAISED as e:
            found = errors.raised(e, doing, resource)
            if isinstance(found, Throttled):
                self.backoff.refused(asked_at)
            raise found from e
        if isinstance(answer, requests.Response) and answer.status_code == 429:
            self.backoff.refused(asked_at)
        else:
            self.backoff.taken(asked_at)
        return answer

    def _authorized(self) -> Any:
        """One for each thread: sessions of ``requests`` are not promised to be safe from several."""
        if not hasattr(self._local, "session"):
            self._local.session = AuthorizedSession(self.credentials)
        return self._local.session


class Sessions:
    """Sessions by (service account, project), made once.

    Args:
        issuer: signs what federation trusts; None with ``anonymous``.
        installation_id: stands in the tokens' subject.
        endpoints: Google's, or a fake's.
        anonymous: signs nothing; for fakes.
    """

    def __init__(
        self,
        issuer: Issuer | None,
        installation_id: str,
        endpoints: Endpoints | None = None,
        *,
        anonymous: bool = False,
    ) -> None:
        if issuer is None and not anonymous:
            raise ValueError("sessions need an issuer")
        self._issuer, self._installation = issuer, installation_id
        self._endpoints, self._anonymous = endpoints or Endpoints(), anonymous
        self._lock = threading.Lock()
        self._made: dict[tuple[str, str, str, str], Session] = {}
        self._backoffs: dict[str, Backoff] = {}

    def get(self, config: GcpConfig, organization: str) -> Session:
        """The session of that project, the same for all its regions.

        Args:
            organization: ours, for the token's ``org`` claim: another one never gets this one's session.
        """
        key = (organization, config.service_account, config.project, config.workload_identity_provider)
        with self._lock:
            if key not in self._made:
                backoff = self._backoffs.setdefault(config.project, Backoff())
                credentials = self._credentials(config, organization)
                self._made[key] = Session(config.project, config.service_account, credentials, self._endpoints, backoff)
            return self._made[key]

    def _credentials(self, config: GcpConfig, organization: str) -> Credentials:
        issuer = self._issuer
        if self._anonymous or issuer is None:
            return AnonymousCredentials()
        subject = f"heliostat:{self._installation}:{organization}"
        return Federated(config, lambda audience: issuer.token(audience, subject, organization), self._endpoints)


def name_of(link: str) -> str:
    """The last part of a resource's URL."""
    return link.rpartition("/")[2]


def matching(field: str, values: Iterable[str]) -> str:
    """A list's filter for any of these values (RE2 with ``eq``, which must match the whole field). The values must
    be names: nothing in them is quoted."""
    return f'{field} eq "({"|".join(sorted(values))})"'
