"""``advanced_instance_config`` on Google Cloud: fields of Compute Engine's ``Instance``, put over ours. Names are those
of the REST API (``minCpuPlatform``) or of the client (``min_cpu_platform``).

What makes a machine one that we can find, end and trust is ours: its name says so when it is refused. All else is
checked by the client's own model of an instance, which takes no call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from clouds.contract.errors import BadConfig
from clouds.contract.retained import RetainedResources

OWNED = {
    "name": "it makes a launch idempotent",
    "metadata": "it starts the node's agent",
    "labels": "set tags of the cluster",
    "scheduling": "give market_type; each machine boots once",
    "machine_type": "give instance_type",
    "guest_accelerators": "give instance_type, e.g. n1-standard-8/nvidia-tesla-t4:1",
    "zone": "set zones",
    "network_interfaces": "the cloud has its network",
    "service_accounts": "the cloud has its nodes' service account",
    "source_machine_image": "it could override Heliostat's fields",
    "deletion_protection": "it would outlive its cluster",
    "params": "it could override Heliostat's fields",
}
"""Field → why it is ours, or what to give instead."""


RETAINED_DEVICE = "heliostat-kept"
"""Device name of a head's retained disk: ``/dev/disk/by-id/google-heliostat-kept``."""


def check(advanced: Mapping[str, Any], keep: RetainedResources | None = None) -> None:
    """Raises BadConfig that names the field."""
    if not advanced:
        return
    from google.cloud import compute_v1  # half a second

    given = _snake(advanced)
    for name, why in OWNED.items():
        if name in given:
            raise _refused(name, f"{name} is set by Heliostat: {why}")
    for name, value in given.items():
        try:
            compute_v1.Instance.from_json(json.dumps({name: value}))
        except Exception as e:  # protobuf's, and what it makes of a value that is none of its kinds
            raise _refused(name, f"an instance has no such field: {e}") from e
    for i, disk in enumerate(given.get("disks", [])):
        if disk.get("auto_delete", True) is not True:
            raise _refused(f"disks.{i}.auto_delete", "a disk always goes with its machine")
        if "source" in disk:
            raise _refused(f"disks.{i}.source", "a disk of its own cannot be in two machines")
        if keep is not None and keep.volume_gib and disk.get("device_name") == RETAINED_DEVICE:
            raise _refused(f"disks.{i}.device_name", f"{RETAINED_DEVICE} is the retained volume")


def put_over(request: dict[str, Any], advanced: Mapping[str, Any]) -> dict[str, Any]:
    """Objects are merged field by field, the boot disk with ours; more disks come beside it and go with the machine;
    else what is given replaces ours."""
    given = _snake(advanced)
    boot, *more = request["disks"]
    for disk in given.pop("disks", []):
        if disk.get("boot"):
            boot = _merged(boot, disk)
        else:
            more.append({**disk, "auto_delete": True})
    return {**_merged(request, given), "disks": [boot, *more]}


def _snake(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", str(k)).lower(): _snake(v) for k, v in value.items()}
    return [_snake(item) for item in value] if isinstance(value, list) else value


def _merged(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return theirs
    return {**ours, **{key: _merged(ours[key], v) if key in ours else v for key, v in theirs.items()}}


def _refused(field: str, why: str) -> BadConfig:
    return BadConfig(
        f"advanced_instance_config is not valid: {why}.", remedy=f"Leave out or correct {field}.", field=field
    )
