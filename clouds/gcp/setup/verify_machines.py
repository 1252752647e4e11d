"""Region and zones, machine type, image and quota: whether a machine could be launched."""

from __future__ import annotations

import re
import uuid
from typing import Any

from clouds.checklist import Checklist
from clouds.contract.errors import Gone
from clouds.contract.machines import MachineSpec
from clouds.gcp.account.session import Session, name_of
from clouds.gcp.machines import instance
from clouds.gcp.machines.catalogue import MachineType, parts, shipped
from clouds.gcp.machines.choice import chosen
from heliostat.errors import CloudError
from heliostat.models.clouds import GcpConfig, Market
from heliostat.models.clusters import NodeRole

_IMAGE = re.compile(r"(?:projects/(?P<project>[^/]+)/)?global/images/(?P<family>family/)?(?P<name>[^/]+)")
ARCHITECTURES = {"X86_64": "x86_64", "ARM64": "arm64"}


def looked_at(found: Checklist, session: Session, config: GcpConfig, installation_id: str) -> None:
    region = _region(found, session, config)
    spec = MachineSpec(
        token=str(uuid.uuid4()),
        cluster_id="heliostat-verify",
        node_id="heliostat-verify",
        generation=0,
        role=NodeRole.HEAD,
        installation_id=installation_id,
        user_data="#!/bin/sh\n",
    )
    name = f"machine type {config.instance_type}"
    kind = found.ask(name, lambda: chosen(spec, config, shipped().only(config.instance_types)))
    if kind is None:
        return
    if region is None:
        found.behind("region", name)
    else:
        cpus = _offered(found, session, config, name)
        _quotas(found, config, region, kind, cpus)
    _images(found, session, config, spec, kind)


def held(session: Session, client: str, method: str, request: dict[str, Any], doing: str) -> list[Any]:
    """The thing; none where it does not exist."""
    try:
        return [session.call(client, method, request, doing)]
    except Gone:
        return []


# -- where


def _region(found: Checklist, session: Session, config: GcpConfig) -> Any | None:
    """The region's description, if it exists and may be read."""
    doing = f"look at region {config.region}"
    answer = found.ask(
        "region", lambda: held(session, "Regions", "get", {"region": config.region}, doing), needed=False
    )
    if answer is None:
        return None
    if not answer:
        found.fail("region", f"There is no region {config.region}.", "Correct the cloud's region and zones.")
        return None
    region = answer[0]
    found.ok("region", f"{config.region}, {region.status}.")
    there = sorted(name_of(link) for link in region.zones)
    for zone in config.zones:
        if zone in there:
            found.ok(f"zone {zone}")
        else:
            found.fail(f"zone {zone}", f"{config.region} has {', '.join(there)}.", "Correct the cloud's zones.")
    return region


# -- what


def _offered(found: Checklist, session: Session, config: GcpConfig, name: str) -> int:
    """In each zone; gives its CPUs, 0 if no zone tells."""
    named = parts(config.instance_type)
    assert named is not None  # `chosen` took it
    machine = named[0]
    told: dict[str, Any] = {}
    for zone in config.zones:
        if found.failed(f"zone {zone}"):
            continue
        request = {"zone": zone, "machine_type": machine}
        doing = f"look at machine type {machine} in {zone}"
        answer = found.ask(
            name,
            lambda request=request, doing=doing: held(session, "MachineTypes", "get", request, doing),  # type: ignore[misc]
            needed=False,
        )
        if answer is None:
            return 0
        told |= {zone: answer[0]} if answer else {}
    missing = [zone for zone in config.zones if zone not in told]
    if not told:
        found.fail(name, f"None of {', '.join(config.zones)} offers it.", "Use another instance type or zone.")
        return 0
    if missing:
        found.warn(
            name,
            f"{', '.join(missing)} does not offer it: launches go to {', '.join(told)}.",
            "Use another instance type, or leave out those zones.",
        )
    else:
        found.ok(name, f"Offered in {', '.join(told)}.")
    return int(next(iter(told.values())).guest_cpus)


def _images(found: Checklist, session: Session, config: GcpConfig, spec: MachineSpec, kind: MachineType) -> None:
    """The one that a node boots which asks for nothing in particular; those of other machines are only warned of."""
    types = shipped().types.values()
    arm = next(t for t in types if t.architecture == "arm64" and not t.gpu)
    gpu = next(t for t in types if t.architecture == "x86_64" and t.gpu)
    usual = _booted(spec, config, kind)
    for name, known in (("image", kind), ("image of ARM machines", arm), ("image of GPU machines", gpu)):
        image = _booted(spec, config, known)
        if name != "image" and image == usual:
            continue
        wrong, remedy = _wrong_with(session, config, image, known)
        if not wrong:
            found.ok(name, image)
        elif name == "image":
            found.fail(name, wrong, remedy)
        else:
            found.warn(name, f"Such machines cannot be launched: {wrong}", remedy)


def _booted(spec: MachineSpec, config: GcpConfig, kind: MachineType) -> str:
    request = instance.request(spec, config, kind, config.zones[0], Market.ON_DEMAND, {})
    return str(request["disks"][0]["initialize_params"]["source_image"])


def _wrong_with(session: Session, config: GcpConfig, image: str, kind: MachineType) -> tuple[str, str]:
    """(what, what to do); nothing wrong is ("", "")."""
    named = _IMAGE.fullmatch(image)
    if named is None:
        return f"{image} is not a valid image path.", "Write projects/<project>/global/images/[family/]<name>."
    where = {"project": named["project"] or session.project}
    try:
        if named["family"]:
            answer = session.call(
                "Images", "get_from_family", {**where, "family": named["name"]}, f"look at image family {image}"
            )
        else:
            answer = session.call("Images", "get", {**where, "image": named["name"]}, f"look at image {image}")
    except Gone:
        return f"There is no image {image}, or Heliostat may not use it.", "Correct the cloud's config."
    except CloudError as e:
        return e.message, e.remedy
    architecture = ARCHITECTURES.get(answer.architecture, kind.architecture)
    if architecture != kind.architecture:
        return (
            f"{image} is {architecture}, and {kind.name} is {kind.architecture}.",
            "Use an image and a machine type of the same architecture.",
        )
    if answer.disk_size_gb > config.root_volume_gib:
        return (
            f"{image} wants {answer.disk_size_gb} GiB of disk, and machines have {config.root_volume_gib}.",
            f"Set root_volume_gib to {answer.disk_size_gb} at least.",
        )
    return "", ""


# -- how many


def _quotas(found: Checklist, config: GcpConfig, region: Any, kind: MachineType, cpus: int) -> None:
    """The region's free quota for one more machine, by https://cloud.google.com/compute/resource-usage."""
    room = {q.metric: (q.limit, q.usage) for q in region.quotas}
    family = f"{config.instance_type.partition('-')[0].upper()}_CPUS"  # E2 and N1 count as CPUS
    wanted = {family if family in room else "CPUS": float(cpus or kind.cpu), "INSTANCES": 1.0}
    if config.external_ip:
        wanted["IN_USE_ADDRESSES"] = 1.0
    if kind.disk == "pd-balanced" and config.root_volume_type in (None, "pd-balanced", "pd-ssd"):
        wanted["SSD_TOTAL_GB"] = float(config.root_volume_gib)
    if kind.gpu and kind.accelerator:
        gpus = f"{kind.accelerator.upper().replace('-', '_').replace('TESLA_', '')}_GPUS"
        wanted[gpus if gpus in room else "GPUS_ALL_REGIONS"] = float(kind.gpu)
    for metric, each in wanted.items():
        if metric not in room or not each:
            continue
        limit, usage = room[metric]
        said = f"{usage:g} of {limit:g} are used in {config.region}; a {config.instance_type} takes {each:g}"
        if limit - usage < each:
            found.fail(
                f"quota {metric}",
                f"{said}: not one more machine.",
                "End what is not needed, or ask for more (console: IAM & Admin, Quotas).",
            )
        else:
            found.ok(f"quota {metric}", f"{said}: room for {int((limit - usage) // each)}.")
