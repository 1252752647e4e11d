"""Whether Google lets us act as the customer's service account, and what that one may do."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import google.auth.transport.requests
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError, OAuthError, RefreshError

from clouds.checklist import Checklist
from clouds.gcp.account import errors
from clouds.gcp.account.session import Federated, Session
from clouds.gcp.bucket.signing import Signer
from clouds.gcp.setup import rights
from heliostat.errors import CloudError
from heliostat.models.clouds import GcpConfig

AT_ONCE = 100
"""Permissions that one testIamPermissions takes."""
TOKEN, ACCOUNT = "token exchange", "service account"

_WRONG = (
    # In STS's words, as they were seen in issues of google-github-actions/auth; what to look at.
    (
        "attribute condition",
        "The provider's condition does not let this organization's tokens pass: compare it with `heliostat cloud "
        "setup`'s.",
    ),
    ("stale", "Set the clock of the control plane's host right (NTP)."),
    ("audience in", "Leave the provider's allowed audiences empty: the default is the one that we ask for."),
    (
        "issuer",
        "The provider's issuer must be this control plane's public URL, which Google must reach over https, or its "
        "keys must be uploaded to the provider (`jwks_json`).",
    ),
    ("audience", "Make the pool and its provider, or correct `workload_identity_provider` (by the project's number)."),
    ("", "Compare the provider's issuer, keys, audience and condition with `heliostat cloud setup`'s."),
)
"""The first whose text is in the error of STS."""


def looked_at(found: Checklist, session: Session, config: GcpConfig) -> bool:
    """Checks the exchange of our token, then acting as the account. Returns whether calls are possible."""
    if isinstance(session.credentials, AnonymousCredentials):
        found.skip(TOKEN, "Nobody is asked: this installation calls a fake, without credentials.")
        return True
    try:
        credentials = session.credentials
        renew = credentials.prove if isinstance(credentials, Federated) else credentials.refresh
        renew(google.auth.transport.requests.Request())
    except OAuthError as e:
        said = _said(e)
        found.fail(TOKEN, f"Google rejects the control plane's token: {said}", next(r for w, r in _WRONG if w in said))
        found.behind(TOKEN, ACCOUNT)
        return False
    except RefreshError as e:
        found.ok(TOKEN, config.workload_identity_provider)
        found.fail(
            ACCOUNT,
            f"The control plane may not act as {config.service_account}: {_said(e)}",
            _impersonation(config, _said(e)),
        )
        return False
    except GoogleAuthError as e:
        error = errors.raised(e, "exchange our token")
        found.fail(TOKEN, error.message, error.remedy)
        found.behind(TOKEN, ACCOUNT)
        return False
    found.ok(TOKEN, config.workload_identity_provider)
    found.ok(ACCOUNT, f"The control plane acts as {config.service_account}, for an hour at a time.")
    return True


def _said(e: GoogleAuthError) -> str:
    """Google's message; it holds no token."""
    body = next((arg for arg in e.args[1:] if isinstance(arg, str)), "") or str(e)
    try:
        told = json.loads(body)
        held = told.get("error")
        return str(held["message"] if isinstance(held, dict) else f"{held}: {told.get('error_description', '')}")
    except (ValueError, KeyError, AttributeError):
        return body[:500]


def _impersonation(config: GcpConfig, said: str) -> str:
    if "has not been used in project" in said or "SERVICE_DISABLED" in said:
        return "Enable the API: gcloud services enable iamcredentials.googleapis.com"
    pool = config.workload_identity_provider.partition("/providers/")[0]
    return (
        f"Does the account exist? Grant roles/iam.workloadIdentityUser on it: gcloud iam service-accounts "
        f"add-iam-policy-binding {config.service_account} --role=roles/iam.workloadIdentityUser "
        f"--member=principal://iam.googleapis.com/{pool}/subject/SUBJECT (the subject is in `heliostat cloud setup`'s "
        f"template)."
    )


def grant(config: GcpConfig, permissions: list[str]) -> str:
    """What to do about missing ones, which are all of one kind."""
    account = f"serviceAccount:{config.service_account}"
    wanted = ",".join(permissions)
    if permissions[0] == rights.SIGN:
        return (
            f"gcloud iam service-accounts add-iam-policy-binding {config.service_account} "
            f"--role=roles/iam.serviceAccountTokenCreator --member={account}"
        )
    if permissions[0].startswith("storage."):
        return (
            f"Grant a role with {wanted} on the bucket: gcloud storage buckets add-iam-policy-binding "
            f"gs://{config.bucket} --role=ROLE --member={account}"
        )
    return (
        f"Add to the custom role of {config.service_account}: gcloud iam roles update ROLE "
        f"--project={config.project} --add-permissions={wanted}"
    )


# -- permissions


def permissions(found: Checklist, session: Session, config: GcpConfig, now: Callable[[], datetime]) -> None:
    """One line each; those of load balancers as one, if there are none at all. Tells the clock by the way."""
    machines, balancers, looks = rights.of_machines(config), rights.of_balancers(), rights.of_looks()
    answer = found.ask("permissions", lambda: _test_project(session, [*machines, *balancers, *looks]))
    if answer is None:
        return
    held, date = answer
    found.clock("clock", date, now())
    for permission in machines:
        _line(found, config, permission, permission in held)
    if held.isdisjoint(balancers):
        remedy = f"For services, add: {grant(config, balancers)}"
        found.skip("permissions of load balancers", "The account has none: this cloud runs no services.", remedy)
    else:
        for permission in balancers:
            _line(found, config, permission, permission in held)
    for permission in looks:
        if permission in held:
            found.ok(f"right {permission}")
        else:
            found.skip(f"right {permission}", "Wanted by `cloud verify` alone.", grant(config, [permission]))
    if found.ask("right to sign URLs", lambda: Signer(session).url("GET", config.bucket, "heliostat-verify", 60)):
        found.ok("right to sign URLs", f"{rights.SIGN} of the account on itself.")
    if config.node_service_account is not None:
        _act_as(found, session, config.node_service_account)


def _line(found: Checklist, config: GcpConfig, permission: str, held: bool) -> None:
    if held:
        found.ok(f"right {permission}")
    else:
        found.fail(
            f"right {permission}",
            f"{config.service_account} has not the permission {permission} in project {config.project}.",
            grant(config, [permission]),
        )


def _act_as(found: Checklist, session: Session, account: str) -> None:
    """Machines get it only from who may act as it."""
    name = f"right {rights.ACT_AS}"
    held = found.ask(
        name, lambda: _test(session, f"{_account_url(session, account)}:testIamPermissions", [rights.ACT_AS])
    )
    if held is None:
        return
    if rights.ACT_AS in held[0]:
        found.ok(name, f"On {account}.")
    else:
        found.fail(
            name,
            f"{session.service_account} may not give machines the account {account}, or there is no such account.",
            f"gcloud iam service-accounts add-iam-policy-binding {account} --role=roles/iam.serviceAccountUser "
            f"--member=serviceAccount:{session.service_account}",
        )


def _account_url(session: Session, account: str) -> str:
    return f"{session.endpoints.accounts}/v1/projects/-/serviceAccounts/{account}"


def _test_project(session: Session, wanted: list[str]) -> tuple[set[str], str]:
    held: set[str] = set()
    date = ""
    url = f"{session.endpoints.projects}/v1/projects/{session.project}:testIamPermissions"
    for start in range(0, len(wanted), AT_ONCE):
        some, date = _test(session, url, wanted[start : start + AT_ONCE])
        held |= some
    return held, date


def _test(session: Session, url: str, wanted: list[str]) -> tuple[set[str], str]:
    """Those that we have, and the answer's date. Asking takes no right
    (https://cloud.google.com/resource-manager/reference/rest/v1/projects/testIamPermissions)."""
    answer = session.http("POST", url, "test permissions", json={"permissions": wanted})
    if answer.status_code == 404:
        raise CloudError(
            f"Google Cloud does not know {url.rpartition('/')[2].partition(':')[0]}.",
            remedy="Correct the cloud's config.",
        )
    told: dict[str, Any] = answer.json()
    return set(told.get("permissions", [])), str(answer.headers.get("date", ""))
