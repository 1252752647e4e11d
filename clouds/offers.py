"""What the providers offer, by provider: with ``installation.py`` one of the places that name concrete clouds. Loads no
vendor's library until somebody gives an ``advanced_instance_config``.

An operator's own catalogues, ``<home>/aws-types.csv`` and ``<home>/gcp-types.csv``, stand before those that ship with
us: ``python -m clouds.aws.machines.catalogue refresh`` and ``python -m clouds.gcp.machines.catalogue refresh``
write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clouds.aws.machines import catalogue as aws
from clouds.contract.retained import RetainedResources
from clouds.gcp.machines import catalogue as gcp
from clouds.instance_types import Offer
from heliostat.models.clouds import Provider


def offers(home: Path) -> dict[str, Offer]:
    """Raises Unavailable for a catalogue that cannot be read."""
    return {
        Provider.AWS: Offer(aws.of(home), _check_aws),
        Provider.GCP: Offer(gcp.of(home), _check_gcp),
    }


def _check_aws(advanced: Mapping[str, Any], keep: RetainedResources | None) -> None:
    from clouds.aws.machines.advanced import check

    check(advanced, keep)


def _check_gcp(advanced: Mapping[str, Any], keep: RetainedResources | None) -> None:
    from clouds.gcp.machines.advanced import check

    check(advanced, keep)
