"""One machine as an insert request of Compute Engine (``request``), and as its answer (``machine``)."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, Machine, MachineSpec, MachineState
from clouds.contract.retained import DEVICES
from clouds.gcp.account.operations import label
from clouds.gcp.machines import advanced
from clouds.gcp.machines.catalogue import MachineType, parts
from heliostat.models.clouds import GcpConfig, Market

NAME = re.compile(r"hs-[0-9a-f]{32}")
MAX_USER_DATA_BYTES = 256 * 1024
"""Of one metadata value (https://cloud.google.com/compute/docs/metadata/setting-custom-metadata#limitations)."""
GENERATION_LABEL, TOKEN_LABEL = "heliostat-generation", "heliostat-token"
REQUEST_LABEL = "heliostat-request"
"""Digest of the request, by which another one under the same token is known."""
RETAINED_DEVICES = f"/dev/disk/by-id/google-{advanced.RETAINED_DEVICE}"
"""Where the disk that a head keeps appears."""
TAGS_KEY = "heliostat-tags"
"""Metadata item with the exact tags: labels have fewer letters."""
SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
"""Of the machine's service account; what it may do is decided by that account's roles."""

STATES = {
    "PROVISIONING": MachineState.PENDING,
    "STAGING": MachineState.PENDING,
    "RUNNING": MachineState.RUNNING,
    "REPAIRING": MachineState.RUNNING,
    "PENDING_STOP": MachineState.STOPPING,
    "STOPPING": MachineState.STOPPING,
    "SUSPENDING": MachineState.STOPPING,
    "SUSPENDED": MachineState.STOPPING,
    "DEPROVISIONING": MachineState.STOPPING,
    "STOPPED": MachineState.GONE,
    "TERMINATED": MachineState.GONE,
}
"""https://cloud.google.com/compute/docs/instances/instance-lifecycle. A stopped machine never boots again: for us it is
gone, although its disk is there until it is deleted."""


def name_for(token: str) -> str:
    """Name of the machine launched under that token, and its id: the same in every zone."""
    return f"hs-{hashlib.sha256(token.encode()).hexdigest()[:32]}"


def request_id(token: str, zone: str, market: Market, attempt: int) -> str:
    """Compute Engine's idempotency key of one attempt."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"heliostat {token} {zone} {market} {attempt}"))


def digest(spec: MachineSpec) -> str:
    return spec.digest()[:40]


def tags(spec: MachineSpec) -> dict[str, str]:
    ours = {OWNER_TAG: spec.installation_id, CLUSTER_TAG: spec.cluster_id, NODE_TAG: spec.node_id}
    return spec.tags | ours


def labels(spec: MachineSpec, more: Mapping[str, str]) -> dict[str, str]:
    """The tags as far as labels take them, for the operator's bills and filters, and our own."""
    given = {**more, **spec.tags}
    theirs = {label(key): label(value) for key, value in given.items() if label(key)[:1].isalpha()}
    return theirs | {
        OWNER_TAG: label(spec.installation_id),
        CLUSTER_TAG: label(spec.cluster_id),
        NODE_TAG: label(spec.node_id),
        GENERATION_LABEL: str(spec.generation),
        TOKEN_LABEL: label(spec.token),
        REQUEST_LABEL: digest(spec),
    }


def subnetwork(config: GcpConfig) -> str:
    """Of machines, as a path."""
    named = config.subnetwork
    return named if "/" in named else f"regions/{config.region}/subnetworks/{named}"


def request(
    spec: MachineSpec,
    config: GcpConfig,
    kind: MachineType,
    zone: str,
    market: Market,
    more: Mapping[str, str],
    *,
    retained_disk: dict[str, Any] | None = None,
    ip: str | None = None,
) -> dict[str, Any]:
    """The instance to insert, as fields of ``compute_v1.Instance``.

    Shielded; the disk encrypted and deleted with it; no public address, no SSH key and no OS login unless the config
    says so; never started again by the cloud, for each machine boots once. Secure boot is off where there are
    GPUs: NVIDIA's driver is a module that Google's images do not sign.

    Args:
        more: labels beside the node's.
        retained_disk, ip: what a head has from the one before (``clouds.gcp.machines.retained``).
    """
    named = parts(kind.name)
    assert named is not None
    machine_type, attached, count = named
    ours = labels(spec, more)
    image = config.arm_image if kind.architecture == "arm64" else config.image
    if kind.gpu and config.gpu_image:
        image = config.gpu_image
    disk: dict[str, Any] = {
        "boot": True,
        "auto_delete": True,
        "initialize_params": {
            "source_image": image,
            "disk_size_gb": config.root_volume_gib,
            "disk_type": f"zones/{zone}/diskTypes/{config.root_volume_type or kind.disk}",
            "labels": ours,
        },
    }
    if config.kms_key is not None:
        disk["disk_encryption_key"] = {"kms_key_name": config.kms_key}
    interface: dict[str, Any] = {"subnetwork": subnetwork(config)}
    if ip is not None:
        interface["network_i_p"] = ip
    if config.external_ip:
        interface["access_configs"] = [{"name": "External NAT", "type_": "ONE_TO_ONE_NAT"}]
    metadata = {
        "startup-script": spec.user_data.replace(DEVICES, RETAINED_DEVICES),
        TAGS_KEY: json.dumps(tags(spec), sort_keys=True),
        "block-project-ssh-keys": "TRUE",
        "enable-oslogin": "FALSE",
        "serial-port-enable": "FALSE",  # nobody types there; its output is kept all the same
    }
    wanted: dict[str, Any] = {
        "name": name_for(spec.token),
        "description": f"Heliostat node {spec.node_id} of {spec.cluster_id}",
        "machine_type": f"zones/{zone}/machineTypes/{machine_type}",
        "labels": ours,
        "disks": [disk, retained_disk] if retained_disk else [disk],
        "network_interfaces": [interface],
        "metadata": {"items": [{"key": key, "value": value} for key, value in metadata.items()]},
        "scheduling": _scheduling(config, kind, market),
    }
    if config.node_service_account is not None:
        wanted["service_accounts"] = [{"email": config.node_service_account, "scopes": SCOPES}]
    if config.network_tags:
        wanted["tags"] = {"items": list(config.network_tags)}
    if attached:
        accelerator = f"zones/{zone}/acceleratorTypes/{attached}"
        wanted["guest_accelerators"] = [{"accelerator_type": accelerator, "accelerator_count": count}]
    if kind.architecture == "x86_64":
        wanted["shielded_instance_config"] = {
            "enable_secure_boot": kind.gpu == 0,
            "enable_vtpm": True,
            "enable_integrity_monitoring": True,
        }
    return advanced.put_over(wanted, spec.advanced) if spec.advanced else wanted


def machine(instance: Any, reason: str = "") -> Machine:
    """What a ``compute_v1.Instance`` says."""
    held = exact_tags(instance)
    interfaces = list(instance.network_interfaces)
    state = STATES.get(instance.status, MachineState.PENDING)
    return Machine(
        machine_id=instance.name,
        node_id=held.get(NODE_TAG),
        cluster_id=held.get(CLUSTER_TAG),
        state=state,
        ip=(interfaces[0].network_i_p or None) if interfaces else None,
        launched_at=datetime.fromisoformat(instance.creation_timestamp),
        reason=reason or (instance.status_message if state is MachineState.GONE else ""),
        tags=held,
    )


def exact_tags(instance: Any) -> dict[str, str]:
    """The tags that it was launched with, by its metadata; by its labels where somebody took that away."""
    for item in instance.metadata.items:
        if item.key == TAGS_KEY:
            found: dict[str, str] = json.loads(item.value)
            return found | {OWNER_TAG: instance.labels.get(OWNER_TAG, "")}  # the label is what filters go by
    return dict(instance.labels)


def _scheduling(config: GcpConfig, kind: MachineType, market: Market) -> dict[str, Any]:
    spot = market is Market.SPOT
    found: dict[str, Any] = {
        "automatic_restart": False,
        # Live migration is not to be had for spot machines and those with GPUs.
        "on_host_maintenance": "TERMINATE" if spot or kind.gpu else "MIGRATE",
        "provisioning_model": "SPOT" if spot else "STANDARD",
    }
    if config.max_run_hours is not None:
        found["max_run_duration"] = {"seconds": config.max_run_hours * 3600}
    if spot or config.max_run_hours is not None:
        found["instance_termination_action"] = "DELETE"
    return found
