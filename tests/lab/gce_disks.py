"""Disks and internal addresses of the Google Cloud fake that outlive an instance: an insert that makes a disk of its
own or names one that is there, and who uses what. Disks that go with their instance are not kept at all.

Not known of the real one: whether an insert that fails after it began removes a disk that it has made with autoDelete
off. Here it stays, which is the worse case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.lab.gce_filter import Refused, Resource, fingerprint

if TYPE_CHECKING:
    from tests.lab.gce_state import GceState, Key


def check(state: GceState, zone: str, body: Resource) -> None:
    """Refuses an instance whose disk or address is not to be had."""
    for disk in body["disks"]:
        if "source" in disk:
            key = state.key(_full(state, disk["source"]))
            state.held(key)
            if key[0] != f"zones/{zone}":
                raise Refused(400, "invalid", f"Invalid value for field 'resource.disks': '{disk['source']}'. Zone.")
            check_unused(state, key)
        elif (name := _own(disk)) is not None and (f"zones/{zone}", "disks", name) in state.resources:
            raise Refused(409, "alreadyExists", f"The resource 'zones/{zone}/disks/{name}' already exists")
    ip = body["networkInterfaces"][0].get("networkIP")
    if ip is not None and (users := _machines_at(state, ip)):
        raise Refused(400, "resourceInUseByAnotherResource", f"IP '{ip}' is already being used by '{users[0]}'.")


def make(state: GceState, key: Key, body: Resource) -> Resource:
    """The instance's body, with disks of its own made and named."""
    disks = []
    for disk in body["disks"]:
        name = _own(disk)
        if name is not None:
            made = (key[0], "disks", name)
            given = disk["initializeParams"]
            state.resources[made] = {
                "name": name,
                "id": str(len(state.resources) + 1),
                "zone": state.link("zones", "", "").replace("zones//", key[0]),
                "selfLink": state.link(*made),
                "creationTimestamp": state.stamp(),
                "sizeGb": given["diskSizeGb"],
                "type": given["diskType"],
                "labels": given.get("labels", {}),
                "labelFingerprint": fingerprint(given.get("labels")),
                "status": "READY",
            }
            disk = {k: v for k, v in disk.items() if k != "initializeParams"} | {"source": state.link(*made)}
        disks.append(disk)
    return {**body, "disks": disks}


def internal(state: GceState) -> str:
    """An address that nobody has."""
    number = next(state._addresses)
    return f"{state.network}.{number >> 8}.{number & 255}"


def shown(state: GceState, key: Key, r: Resource) -> Resource:
    """With those that use it, where they are known by their own words."""
    users = _users(state, key, r)
    return {**r, "users": users} if users else r


def check_unused(state: GceState, key: Key) -> None:
    users = _users(state, key, state.held(key))
    if users:
        said = f"The {key[1]} resource '{key[2]}' is already being used by '{users[0]}'"
        raise Refused(400, "resourceInUseByAnotherResource", said)


def _users(state: GceState, key: Key, r: Resource) -> list[str]:
    if key[1] == "addresses":
        return _machines_at(state, str(r.get("address")))
    if key[1] != "disks":
        return []
    return [i["selfLink"] for i in _instances(state)
            if any("source" in d and state.key(_full(state, d["source"])) == key for d in i["disks"])]  # fmt: skip


def _machines_at(state: GceState, ip: str) -> list[str]:
    return [i["selfLink"] for i in _instances(state) if i["networkInterfaces"][0]["networkIP"] == ip]


def _instances(state: GceState) -> list[Resource]:
    """A stopped one too: it has its disks and its address until it is deleted."""
    return [r for key, r in state.resources.items() if key[1] == "instances"]


def _own(disk: dict[str, Any]) -> str | None:
    """The name of a disk that the insert is to make, and that is to outlive its instance."""
    return None if disk.get("autoDelete") else disk.get("initializeParams", {}).get("diskName")


def _full(state: GceState, source: str) -> str:
    return source if source.startswith(("https://", "projects/")) else f"projects/{state.project}/{source}"
