"""Verifying a cloud: its checks, whatever they are, on a worker's thread."""

from __future__ import annotations

from collections.abc import Mapping

from temporalio import activity
from temporalio.exceptions import ApplicationError

from clouds.registry import Verify
from heliostat.errors import CloudError
from heliostat.models.clouds import Check, CheckState


class CloudActivities:
    """Carries the clouds' checks by cloud id."""

    def __init__(self, verifies: Mapping[str, Verify]) -> None:
        self._verifies = verifies

    @activity.defn
    def verify_cloud(self, cloud_id: str) -> list[Check]:
        """A cloud that can't be looked at at all is one failed check."""
        verify = self._verifies.get(cloud_id)
        if verify is None:
            raise ApplicationError(f"There is no cloud {cloud_id}: it was deleted.", type="gone", non_retryable=True)
        try:
            return verify()
        except CloudError as e:
            return [Check(name="cloud", state=CheckState.FAILED, detail=e.message, remedy=e.remedy)]
