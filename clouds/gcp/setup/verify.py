"""``cloud verify`` for Google Cloud: trust, every permission, network, image, quota and bucket that a cluster would
want, looked at before one is launched.

Creates one object, under ``heliostat-verify/`` in the cloud's prefix, and deletes it again. Compute Engine has no dry
run: ``testIamPermissions`` gives the permissions.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from clouds.checklist import Checklist
from clouds.contract.errors import Denied
from clouds.gcp.account.session import Session
from clouds.gcp.setup import verify_bucket, verify_machines, verify_network, verify_trust
from heliostat.models.clouds import Check, GcpConfig
from heliostat.models.common import utcnow


def checks(
    session: Session,
    config: GcpConfig,
    *,
    installation_id: str,
    api_url: str,
    now: Callable[[], datetime] = utcnow,
) -> list[Check]:
    """What was found, one line for each permission, network rule and resource. Raises nothing for what it finds.

    Args:
        session: of ``config``'s project, as the organization.
        installation_id: as machines' labels will have it.
        api_url: what machines will call.
        now: this host's clock.
    """

    def granting(e: Denied) -> str:
        permission = str(e.details.get("permission", ""))
        return verify_trust.grant(config, [permission]) if permission else e.remedy

    found = Checklist(granting)
    found.api(api_url)
    if not verify_trust.looked_at(found, session, config):
        found.behind("service account", "permissions", "bucket", "zones", "subnetwork", "firewall", "image")
        return found.checks
    verify_trust.permissions(found, session, config, now)
    verify_bucket.looked_at(found, session, config)
    verify_machines.looked_at(found, session, config, installation_id)
    if found.failed("region"):
        found.behind("region", "subnetwork", "firewall")
    else:
        verify_network.looked_at(found, session, config, api_url)
    return found.checks
