"""Calls of a cloud: the part of the cloud that is meant, and its errors as failures of an activity."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TypeVar

from temporalio.exceptions import ApplicationError

from clouds.contract.errors import BadConfig, Denied, NoCapacity, QuotaExceeded, Throttled
from heliostat.errors import CloudError

T = TypeVar("T")

FINAL = (NoCapacity, QuotaExceeded, BadConfig, Denied)
"""Another try of the same request does not cure these: the workflow decides what to request next."""


def part_of(parts: Mapping[str, T], cloud_id: str) -> T:
    """The machines or the load balancer of this cloud."""
    try:
        return parts[cloud_id]
    except KeyError:
        raise ApplicationError(
            f"This worker does not serve the cloud {cloud_id}: it was deleted, or it belongs to another server.",
            type="unavailable",
        ) from None


def as_failure(error: CloudError) -> ApplicationError:
    """The error's code becomes the failure's type, by which workflows decide."""
    return ApplicationError(
        str(error),
        type=error.code,
        non_retryable=isinstance(error, FINAL),
        next_retry_delay=timedelta(seconds=5) if isinstance(error, Throttled) else None,
    )
