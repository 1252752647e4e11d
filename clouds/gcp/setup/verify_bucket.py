"""The bucket: its owner, its region, and whether it can be written to and read from."""

from __future__ import annotations

from clouds.checklist import Checklist
from clouds.gcp.account.session import Session
from clouds.gcp.bucket.bucket import GcpBucket
from heliostat.models.clouds import GcpConfig


def looked_at(found: Checklist, session: Session, config: GcpConfig) -> None:
    _whose(found, session, config)
    found.bucket_works(GcpBucket(config, session), f"{config.bucket}/{config.bucket_prefix}")


def _whose(found: Checklist, session: Session, config: GcpConfig) -> None:
    name = "bucket"
    url = f"{session.endpoints.storage}/storage/v1/b/{config.bucket}"
    answer = found.ask(name, lambda: session.http("GET", url, f"look at bucket {config.bucket}"), needed=False)
    if answer is None:
        return
    if answer.status_code == 404:
        found.fail(name, f"There is no bucket {config.bucket}.", "Make it, or correct the cloud's config.")
        return
    told = answer.json()
    location, owner = str(told.get("location", "")).lower(), str(told.get("projectNumber", ""))
    ours = config.workload_identity_provider.split("/")[1]
    if owner and owner != ours:
        found.warn(
            name,
            f"{config.bucket} is of project {owner}, and the workload identity pool of project {ours}.",
            "Code and logs are the bucket's owner's: is that project yours?",
        )
    elif location == config.region or (told.get("locationType") != "region" and config.region.startswith(location)):
        found.ok(name, f"{config.bucket} is in {location}.")
    else:
        found.warn(
            name,
            f"{config.bucket} is in {location}, and the cloud in {config.region}.",
            "It works; traffic between regions is slower and costs money.",
        )
