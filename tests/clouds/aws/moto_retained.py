"""What moto 5.2.5 lacks of disks and network interfaces that outlive a machine (imported by ``moto_plus``):

- CreateVolume and CreateNetworkInterface are idempotent by ClientToken: the same arguments give the same thing, others
  are refused, also after it was deleted.
- A volume is attached to a machine that runs, of its own zone, and to one at a time.
- A machine launched with an interface is in its subnet; an interface is in one machine at a time, and is not deleted
  while it is. Both are free again when the machine is terminated, not before.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

from moto.core.responses import ActionResult
from moto.ec2.exceptions import EC2ClientError, VolumeInUseError
from moto.ec2.models.elastic_network_interfaces import NetworkInterfaceBackend
from moto.ec2.models.instances import Instance
from moto.ec2.responses.elastic_block_store import ElasticBlockStore
from moto.ec2.responses.elastic_network_interfaces import ElasticNetworkInterfaces

_lock = threading.RLock()


def _once(make: Any) -> Any:
    def answer(self: Any) -> ActionResult:
        token = self._get_param("ClientToken")
        if not token:
            return make(self)
        given = repr(sorted((k, v) for k, v in self.data.items() if k not in ("ClientToken", "Timestamp")))
        with _lock:
            seen = self.ec2_backend.__dict__.setdefault("_made_by_token", {})
            key = (make.__name__, token)
            if key not in seen:
                seen[key] = (make(self), given)
            made, before = seen[key]
        if before != given:
            raise EC2ClientError("IdempotentParameterMismatch", "Arguments on this idempotent request differ.")
        return made

    return answer


ElasticBlockStore.create_volume = _once(ElasticBlockStore.create_volume)  # type: ignore[method-assign]
ElasticNetworkInterfaces.create_network_interface = _once(  # type: ignore[method-assign]
    ElasticNetworkInterfaces.create_network_interface
)


_attach, _delete_interface = ElasticBlockStore.attach_volume, NetworkInterfaceBackend.delete_network_interface


def _attached(self: ElasticBlockStore) -> Any:
    volume_id, instance_id = self._get_param("VolumeId"), self._get_param("InstanceId")
    with _lock:
        volume, instance = self.ec2_backend.get_volume(volume_id), self.ec2_backend.get_instance(instance_id)
        if volume.attachment:
            raise VolumeInUseError(volume_id, volume.attachment.instance.id)
        if instance.state != "running":
            raise EC2ClientError("IncorrectState", f"Instance '{instance_id}' is not 'running'.")
        if volume.zone.name != instance.availability_zone:
            raise EC2ClientError("InvalidVolume.ZoneMismatch", f"The volume '{volume_id}' is in another zone.")
        return _attach(self)


def _deleted(self: Any, eni_id: str) -> None:
    with _lock:
        if eni_id in self.enis and self.enis[eni_id].status == "in-use":
            raise EC2ClientError("InvalidParameterValue", f"Network interface '{eni_id}' is currently in use.")
        _delete_interface(self, eni_id)


ElasticBlockStore.attach_volume = _attached  # type: ignore[method-assign]
NetworkInterfaceBackend.delete_network_interface = _deleted  # type: ignore[method-assign]


def place(backend: Any, arguments: dict[str, Any]) -> None:
    """Before a machine is made: what its interface says of where it is."""
    for nic in arguments.get("nics") or []:
        if "NetworkInterfaceId" in nic:
            interface = backend.get_network_interface(nic["NetworkInterfaceId"])
            if interface.status == "in-use":
                raise EC2ClientError("InvalidNetworkInterface.InUse", f"Interface: [{interface.id}] in use.")
            interface.kept = True
            arguments["subnet_id"] = interface.subnet.id


def hold(instance: Instance) -> list[Any]:
    """As the machine begins to end: its own disks go, the others are still with it. They are given."""
    held = {p: d for p, d in instance.block_device_mapping.items() if not d.delete_on_termination}
    for path in held:
        del instance.block_device_mapping[path]
    return [instance.ec2_backend.get_volume(d.volume_id) for d in held.values()]


def let_go(instance: Instance, volumes: list[Any]) -> None:
    """As it is terminated."""
    with _lock:
        for volume in volumes:
            volume.attachment = None
        for index, interface in list(instance.nics.items()):
            if getattr(interface, "kept", False):
                instance.nics[index] = copy.copy(interface)  # what the machine had is told for a while
                interface.instance = interface.attachment_id = interface.attach_time = None
                interface.status = "available"
