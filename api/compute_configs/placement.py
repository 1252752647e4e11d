"""Placement of a compute config in its cloud: refused when it can't fit, else completed with instance types and zones
in the order in which they are tried, so that workflows need no catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from clouds.contract.errors import BadConfig
from clouds.contract.retained import RetainedResources
from clouds.instance_types import InstanceType, Offer, accelerators, is_accelerator, nearest
from heliostat.errors import InvalidRequest
from heliostat.models.clouds import Cloud
from heliostat.models.compute_configs import (
    DEFAULT_CPU,
    DEFAULT_GPU,
    Architecture,
    ComputeConfig,
    HeadNodeConfig,
    NodeConfig,
    PhysicalResources,
)

Offers = Mapping[str, Offer]
"""By provider. Those without one (the local cloud) have machines of no type."""

ALTERNATIVES = 4
"""Types that ``required_resources`` picks for one group: with three zones and two markets they are 24 placements."""


def default_config(name: str) -> ComputeConfig | None:
    """What every cloud has with this name: one node of the cloud's default type, or of the smallest type with a GPU."""
    if name == DEFAULT_CPU:
        return ComputeConfig()
    if name == DEFAULT_GPU:
        return ComputeConfig(head_node=HeadNodeConfig(required_resources=PhysicalResources(CPU=1, GPU=1)))
    return None


def placed(config: ComputeConfig, cloud: Cloud, offers: Offers) -> ComputeConfig:
    """Raises InvalidRequest, which names the field, when the cloud can never have such nodes. Idempotent: a completed
    config is placed as it is."""
    offer = offers.get(cloud.provider)
    _must_fit(config, cloud, typed=offer is not None)
    head = _node("head_node", "the head node", config.head_node, config, cloud, offer)
    groups = [
        _node(f"worker_nodes.{i}", f"worker group {g.name!r}", g, config, cloud, offer)
        for i, g in enumerate(config.worker_nodes)
    ]
    zones = config.zones or list(cloud.capabilities.zones) or None
    return config.model_copy(update={"head_node": head, "worker_nodes": groups, "zones": zones})


def _refuse(field: str, what: str, remedy: str) -> NoReturn:
    raise InvalidRequest(what, remedy=remedy, field=f"compute_config.{field}")


# --- by the cloud's capabilities --------------------------------------------------------------------------------


def _must_fit(config: ComputeConfig, cloud: Cloud, *, typed: bool) -> None:
    """``typed``: machines are of types that the catalogue knows."""
    can = cloud.capabilities

    def refuse(field: str, what: str, limit: str, remedy: str = "") -> NoReturn:
        text = f"This can't fit: {what}; cloud {cloud.name} has {limit}."
        _refuse(field, text, remedy or f"Change {field}, or name another cloud.")

    for zone in config.zones or []:
        if zone not in can.zones:
            there = ", ".join(can.zones) or "(none)"
            refuse("zones", f"zone {zone!r} is requested", f"the zones {there}", nearest(zone, can.zones))
    if config.head_node.keeps and not can.keeps:
        field = "retained_volume" if config.head_node.retained_volume else "fixed_address"
        remedy = f"Leave {field} out, or name a cloud on AWS or Google Cloud."
        refuse(
            f"head_node.{field}",
            f"the head node retains {config.head_node.keeps}",
            "neither retained volumes nor fixed addresses",
            remedy,
        )
    nodes: list[tuple[str, str, NodeConfig]] = [("head_node", "the head node", config.head_node)]
    nodes += [(f"worker_nodes.{i}", f"worker group {g.name!r}", g) for i, g in enumerate(config.worker_nodes)]
    for path, who, node in nodes:
        for field, name in _named(node):
            if can.instance_types is not None and name not in can.instance_types:
                types = ", ".join(can.instance_types) or "no instance types: give required_resources"
                what = f"{who} requests instance type {name!r}"
                refuse(f"{path}.{field}", what, types, nearest(name, can.instance_types))
        at = f"{path}.required_resources" if node.required_resources else f"{path}.resources"
        cpu, memory, gpu = _required(node)
        if typed and node.required_resources is None and _named(node):
            continue  # logical numbers with a type are for Ray only, not for the machine
        if can.max_cpu_per_node is not None and cpu > can.max_cpu_per_node:
            refuse(f"{at}.CPU", f"{who} requests {cpu:g} CPUs", f"{can.max_cpu_per_node:g} per node at most")
        if can.max_memory_per_node is not None and (memory or 0) > can.max_memory_per_node:
            limit = f"{can.max_memory_per_node / 2**30:.1f} GiB per node at most"
            refuse(f"{at}.memory", f"{who} requests {(memory or 0) / 2**30:.1f} GiB of memory", limit)
        if gpu > can.max_gpu_per_node:
            refuse(f"{at}.GPU", f"{who} requests {gpu:g} GPUs", f"{can.max_gpu_per_node} per node")
    for i, group in enumerate(config.worker_nodes):
        if group.market_type not in can.markets:
            field = f"worker_nodes.{i}.market_type"
            refuse(field, f"worker group {group.name!r} requests {group.market_type}", ", ".join(can.markets))


def _named(node: NodeConfig) -> list[tuple[str, str]]:
    """(field, name) of the instance types that are named."""
    if node.instance_type:
        return [("instance_type", node.instance_type)]
    return [(f"instance_types.{i}", name) for i, name in enumerate(node.instance_types)]


def _required(node: NodeConfig) -> tuple[float, int | None, float]:
    """CPUs, bytes of memory and GPUs that the machine must have."""
    need, logical = node.required_resources, node.resources or {}
    if need is not None:
        return need.CPU, need.memory, need.GPU
    memory = logical.get("memory")
    return logical.get("CPU", 0), int(memory) if memory else None, logical.get("GPU", 0)


# --- by the provider's catalogue ----------------------------------------------------------------------------


def _node(
    path: str, who: str, node: NodeConfig, config: ComputeConfig, cloud: Cloud, offer: Offer | None
) -> NodeConfig:
    advanced = _merged(config.advanced_instance_config, node.advanced_instance_config)
    if offer is None:
        _has_no_types(path, node, advanced, cloud)
        return node
    retained = RetainedResources.of(node, had=False) if isinstance(node, HeadNodeConfig) else None
    try:
        offer.check_advanced(advanced, retained)
    except BadConfig as e:
        own = f"{path}." if e.field and e.field.partition(".")[0] in node.advanced_instance_config else ""
        _refuse(f"{own}advanced_instance_config.{e.field}", e.message, e.remedy)
    chosen = [_known(path, field, name, node, cloud, offer) for field, name in _named(node)]
    update: dict[str, Any] = {"advanced_instance_config": advanced}
    if not chosen:
        chosen = _picked(path, who, node, cloud, offer)
        update["instance_types"] = [s.name for s in chosen]
    if node.required_resources is None and chosen:
        least = {"CPU": float(min(s.cpu for s in chosen))}
        gpus = min(s.gpu for s in chosen)
        update["resources"] = least | ({"GPU": float(gpus)} if gpus else {}) | (node.resources or {})
    return node.model_copy(update=update)


def _has_no_types(path: str, node: NodeConfig, advanced: Mapping[str, Any], cloud: Cloud) -> None:
    need = node.required_resources
    asked = {
        "required_resources.accelerator": need.accelerator if need else None,
        "required_resources.cpu_architecture": need.cpu_architecture if need else None,
        "advanced_instance_config": advanced,
    }
    for field, value in asked.items():
        if value:
            remedy = f"Leave out {field.rpartition('.')[2]}, or name another cloud."
            _refuse(f"{path}.{field}", f"Cloud {cloud.name} has no instance types to choose among.", remedy)


def _known(path: str, field: str, name: str, node: NodeConfig, cloud: Cloud, offer: Offer) -> InstanceType:
    instance_type = offer.catalogue.types.get(name)
    if instance_type is None:
        remedy = nearest(name, cloud.capabilities.instance_types or offer.catalogue.types)
        remedy += " If the type is newer than the catalogue, an operator can refresh it."
        _refuse(f"{path}.{field}", f"There is no instance type {name!r} in {cloud.provider}'s catalogue.", remedy)
    need = node.required_resources
    if need is None:
        return instance_type
    architecture = need.cpu_architecture or Architecture.X86_64
    lacks = ""
    if instance_type.cpu < need.CPU or instance_type.memory < (need.memory or 0) or instance_type.gpu < need.GPU:
        lacks = f"has {instance_type.cpu} CPUs, {instance_type.memory / 2**30:g} GiB and {instance_type.gpu} GPUs"
    elif need.accelerator and not is_accelerator(need.accelerator, instance_type.accelerator):
        lacks = f"has {instance_type.accelerator or 'no GPUs'}, not {need.accelerator}"
    elif instance_type.architecture != architecture:
        lacks = f"is {instance_type.architecture}, not {architecture}"
    if lacks:
        remedy = "Leave it out, or change required_resources."
        _refuse(f"{path}.{field}", f"{name} {lacks}: less than required_resources requests.", remedy)
    return instance_type


def _picked(path: str, who: str, node: NodeConfig, cloud: Cloud, offer: Offer) -> list[InstanceType]:
    """The best few types that have the required resources; the cloud's default type when none are required."""
    cpu, memory, gpu = _required(node)
    need = node.required_resources
    types = offer.catalogue.types
    allowed = cloud.capabilities.instance_types
    if not (need or cpu or memory or gpu):
        default = cloud.config.instance_type if cloud.config is not None else None
        return [types[default]] if default is not None and default in types else []
    accelerator = (need.accelerator or "") if need else ""
    architecture = (need.cpu_architecture if need else None) or Architecture.X86_64
    fit = _allowed(offer.catalogue.candidates(cpu, memory, int(gpu), accelerator, architecture), allowed)
    if fit:
        return fit[:ALTERNATIVES]
    at = f"{path}.required_resources" if need else f"{path}.resources"
    known = accelerators(offer.catalogue)
    if accelerator and not any(is_accelerator(accelerator, t.accelerator) for t in types.values()):
        _refuse(
            f"{at}.accelerator", f"{cloud.provider} has no accelerator {accelerator!r}.", nearest(accelerator, known)
        )
    what = f"{cpu:g} CPUs" + (f", {memory / 2**30:g} GiB" if memory else "")
    what += f", {gpu:g} GPUs {accelerator}".rstrip() if gpu else ""
    among = "that this cloud may use" if allowed is not None else "in the catalogue"
    _refuse(
        at,
        f"This can't fit: {who} requests {what} ({architecture}); no instance type {among} has that.",
        "Request less, another accelerator or another cpu_architecture, or name instance_types.",
    )


def _allowed(fit: Sequence[InstanceType], names: list[str] | None) -> list[InstanceType]:
    return [s for s in fit if names is None or s.name in names]


def _merged(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, Mapping) or not isinstance(theirs, Mapping):
        return theirs
    return {**ours, **{key: _merged(ours[key], v) if key in ours else v for key, v in theirs.items()}}
