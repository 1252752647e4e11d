"""The settings that a workflow uses, for resources on one cloud."""

from __future__ import annotations

from heliostat.models.clouds import Cloud
from runtime.messages.common import Limits
from runtime.settings import SLOW_REGISTER_S, Settings


def limits(settings: Settings, cloud: Cloud) -> Limits:
    """Machines that fetch their image at boot have longer to register, unless the operator has set how long."""
    found = Limits.model_validate(settings, from_attributes=True)
    chosen = settings.model_fields_set & {"register_timeout_s", "head_start_timeout_s", "worker_start_timeout_s"}
    if not chosen and cloud.config is not None and cloud.config.made_at_boot:
        found.register_timeout_s = SLOW_REGISTER_S
    return found
