"""The settings that a workflow works by, for what is asked for on a cloud."""

from __future__ import annotations

from heliostat.models.clouds import Cloud
from runtime.messages.common import Limits
from runtime.settings import SLOW_REGISTER_S, Settings


def limits(settings: Settings, cloud: Cloud) -> Limits:
    """Machines that fetch what they run in have longer to call, unless the operator has set how long."""
    found = Limits.model_validate(settings, from_attributes=True)
    told = settings.model_fields_set & {"register_timeout_s", "head_start_timeout_s", "worker_start_timeout_s"}
    if not told and cloud.config is not None and cloud.config.made_at_boot:
        found.register_timeout_s = SLOW_REGISTER_S
    return found
