"""What every kind of resource of Compute Engine shares: its operations, its lists, its labels."""

from __future__ import annotations

import re
from typing import Any

from heliostat.errors import CloudError


def done(op: Any) -> bool:
    return bool(op.status == type(op).Status.DONE)


def reached(page: Any) -> Any:
    """The page of one zone. Raises CloudError if that zone was not reached: what a list lacks counts as gone."""
    if page.warning and page.warning.code == "UNREACHABLE":
        raise CloudError("Google Cloud could not reach every zone.", remedy="Try again.")
    return page


def label(text: str) -> str:
    """As a label's value: small letters, digits, ``_`` and ``-``, 63 of them at most
    (https://cloud.google.com/compute/docs/labeling-resources#requirements)."""
    return re.sub(r"[^a-z0-9_-]", "_", text.lower())[:63]
