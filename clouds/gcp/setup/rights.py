"""The rights that a Google Cloud needs: which permissions each of our calls takes, for the custom role of the template,
for ``verify``, and for people to read.

By the "IAM Permissions" of each method's reference page (https://cloud.google.com/compute/docs/reference/rest/v1),
which name those on what a request refers to as well. ``tests/clouds/gcp/setup/test_rights.py`` holds that
every call has its
entry and every entry its call. IAM knows no condition on labels: the role holds for the whole project, so
a project of its own is the boundary.
"""

from __future__ import annotations

from heliostat.models.clouds import GcpConfig

Call = tuple[str, str]
"""(client, method) as ``Session.call`` has them."""

MACHINES: dict[Call, tuple[str, ...]] = {
    ("Instances", "insert_unary"): (
        "compute.instances.create",
        "compute.instances.setMetadata",
        "compute.instances.setLabels",
        "compute.addresses.use",  # that a head keeps, as its disk
        "compute.addresses.useInternal",
        "compute.disks.create",
        "compute.disks.setLabels",
        "compute.disks.use",
        "compute.images.useReadOnly",  # of images of the project's own
        "compute.subnetworks.use",
    ),
    ("Instances", "aggregated_list"): ("compute.instances.list",),
    ("Instances", "delete_unary"): ("compute.instances.delete",),
    ("Instances", "get_serial_port_output"): ("compute.instances.getSerialPortOutput",),
    ("Disks", "aggregated_list"): ("compute.disks.list",),
    ("Disks", "delete_unary"): ("compute.disks.delete",),
    ("Addresses", "get"): ("compute.addresses.get",),
    ("Addresses", "list"): ("compute.addresses.list",),
    ("Addresses", "insert_unary"): ("compute.addresses.create", "compute.addresses.createInternal"),
    ("Addresses", "delete_unary"): ("compute.addresses.delete", "compute.addresses.deleteInternal"),
    ("RegionOperations", "get"): ("compute.regionOperations.get",),
    ("ZoneOperations", "get"): ("compute.zoneOperations.get",),
    # The list is of all scopes, and what it leaves out counts as gone.
    ("GlobalOperations", "aggregated_list"): (
        "compute.globalOperations.list",
        "compute.regionOperations.list",
        "compute.zoneOperations.list",
    ),
}
"""Of machines, and of what heads keep; load balancers take some of these too."""

BALANCERS: dict[Call, tuple[str, ...]] = {
    ("RegionHealthChecks", "list"): ("compute.regionHealthChecks.list",),
    ("RegionHealthChecks", "insert_unary"): ("compute.regionHealthChecks.create",),
    ("RegionHealthChecks", "delete_unary"): ("compute.regionHealthChecks.delete",),
    ("NetworkEndpointGroups", "aggregated_list"): ("compute.networkEndpointGroups.list",),
    ("NetworkEndpointGroups", "insert_unary"): (
        "compute.networkEndpointGroups.create",
        "compute.networks.use",
        "compute.subnetworks.use",
    ),
    ("NetworkEndpointGroups", "attach_network_endpoints_unary"): (
        "compute.networkEndpointGroups.attachNetworkEndpoints",
        "compute.instances.use",
    ),
    ("NetworkEndpointGroups", "delete_unary"): ("compute.networkEndpointGroups.delete", "compute.instances.use"),
    ("RegionBackendServices", "list"): ("compute.regionBackendServices.list",),
    ("RegionBackendServices", "get_health"): ("compute.regionBackendServices.get",),
    ("RegionBackendServices", "insert_unary"): (
        "compute.regionBackendServices.create",
        "compute.regionHealthChecks.useReadOnly",
        "compute.networkEndpointGroups.use",
    ),
    ("RegionBackendServices", "delete_unary"): ("compute.regionBackendServices.delete",),
    ("RegionUrlMaps", "get"): ("compute.regionUrlMaps.get",),
    ("RegionUrlMaps", "list"): ("compute.regionUrlMaps.list",),
    ("RegionUrlMaps", "insert_unary"): ("compute.regionUrlMaps.create", "compute.regionBackendServices.use"),
    ("RegionUrlMaps", "patch_unary"): ("compute.regionUrlMaps.update", "compute.regionBackendServices.use"),
    ("RegionUrlMaps", "delete_unary"): ("compute.regionUrlMaps.delete",),
    ("RegionTargetHttpProxies", "insert_unary"): (
        "compute.regionTargetHttpProxies.create",
        "compute.regionUrlMaps.use",
    ),
    ("RegionTargetHttpProxies", "delete_unary"): ("compute.regionTargetHttpProxies.delete",),
    ("RegionTargetHttpsProxies", "get"): ("compute.regionTargetHttpsProxies.get",),
    ("RegionTargetHttpsProxies", "set_ssl_certificates_unary"): (
        "compute.regionTargetHttpsProxies.setSslCertificates",
        "compute.regionSslCertificates.get",
    ),
    ("RegionTargetHttpsProxies", "insert_unary"): (
        "compute.regionTargetHttpsProxies.create",
        "compute.regionUrlMaps.use",
        "compute.regionSslCertificates.get",
    ),
    ("RegionTargetHttpsProxies", "delete_unary"): ("compute.regionTargetHttpsProxies.delete",),
    ("ForwardingRules", "get"): ("compute.forwardingRules.get",),
    ("ForwardingRules", "list"): ("compute.forwardingRules.list",),
    ("ForwardingRules", "insert_unary"): (
        "compute.forwardingRules.create",
        "compute.forwardingRules.setLabels",
        "compute.addresses.use",
        "compute.addresses.useInternal",
        "compute.networks.use",
        "compute.subnetworks.use",
        "compute.regionTargetHttpProxies.use",
        "compute.regionTargetHttpsProxies.use",
    ),
    ("ForwardingRules", "delete_unary"): ("compute.forwardingRules.delete",),
}
"""Of services' load balancers."""

LOOKS: dict[Call, tuple[str, ...]] = {
    ("Regions", "get"): ("compute.regions.get",),
    ("MachineTypes", "get"): ("compute.machineTypes.get",),
    ("Images", "get"): ("compute.images.get",),
    ("Images", "get_from_family"): ("compute.images.getFromFamily",),
    ("Subnetworks", "get"): ("compute.subnetworks.get",),
    ("Subnetworks", "list"): ("compute.subnetworks.list",),
    ("Routers", "list"): ("compute.routers.list",),
    ("Firewalls", "list"): ("compute.firewalls.list",),
    ("RegionSslCertificates", "get"): ("compute.regionSslCertificates.get",),
}
"""What ``cloud verify`` looks at. Running machines takes none of these."""

OBJECTS = ("storage.objects.create", "storage.objects.delete", "storage.objects.get", "storage.objects.list")
"""On the bucket alone. Writing over an object deletes the one before."""
LOOK_AT_BUCKET = "storage.buckets.get"
SIGN = "iam.serviceAccounts.signBlob"
"""Of the account on itself: presigned URLs."""
ACT_AS = "iam.serviceAccounts.actAs"
"""On the machines' own service account."""
NODE_OBJECTS = ("storage.objects.create", "storage.objects.delete", "storage.objects.get")
"""Of machines, on the bucket alone."""


def of_machines(config: GcpConfig | None = None) -> list[str]:
    """Args: config: None: whatever any config may need."""
    found = set(_all(MACHINES))
    if config is None or config.node_service_account is not None:
        found.add("compute.instances.setServiceAccount")
    if config is None or config.network_tags:
        found.add("compute.instances.setTags")
    if config is None or config.external_ip:
        found.add("compute.subnetworks.useExternalIp")
    return sorted(found)


def of_balancers() -> list[str]:
    """Besides those of machines."""
    return sorted(set(_all(BALANCERS)) - set(of_machines()))


def of_looks() -> list[str]:
    return sorted(set(_all(LOOKS)) - set(of_machines()) - set(of_balancers()))


def custom_role() -> list[str]:
    """Permissions of the role that the control plane's account has in the project."""
    return sorted({*of_machines(), *of_balancers(), *of_looks()})


def _all(calls: dict[Call, tuple[str, ...]]) -> list[str]:
    return [permission for permissions in calls.values() for permission in permissions]
