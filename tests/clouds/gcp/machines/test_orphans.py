"""Disks that belong to no machine any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from clouds.contract.errors import Denied
from clouds.contract.machines import OWNER_TAG
from tests.clouds.gcp.support import gcp_cloud
from tests.clouds.support import OURS, eventually

pytestmark = pytest.mark.long  # starts the fake of the whole cloud


def test_what_is_ours_unattached_and_old_is_deleted(tmp_path: Path) -> None:
    with gcp_cloud(tmp_path) as (cloud, fake):

        def disk(name: str, owner: str = OURS, user: str = "") -> None:
            fake.resources["zones/us-central1-a", "disks", name] = {
                "name": name,
                "id": "7",
                "zone": "https://x/projects/acme-prod-1/zones/us-central1-a",
                "selfLink": fake.link("zones/us-central1-a", "disks", name),
                "creationTimestamp": fake.stamp(),
                "labels": {OWNER_TAG: owner},
                "users": [user] if user else [],
            }

        for name in ("old-1", "old-2"):
            disk(name)
        disk("theirs", owner="another")
        disk("in-use", user="https://x/projects/acme-prod-1/zones/us-central1-a/instances/i")
        assert cloud.machines.delete_orphans(OURS, 3600) == [], "the newborn: a machine may be about to take them"
        fake.fail("denied", "delete", permission="compute.disks.delete")
        with pytest.raises(Denied):
            cloud.machines.delete_orphans(OURS, 0)
        assert cloud.machines.delete_orphans(OURS, 0)

        def left() -> set[str]:
            return {name for _, kind, name in fake.resources if kind == "disks"}

        eventually(lambda: left() == {"theirs", "in-use"})
        assert cloud.machines.delete_orphans(OURS, 0) == []
