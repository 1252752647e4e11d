"""What the Google Cloud fake knows: resources, operations that take time, faults. ``tests.lab.gce`` serves it.

Its shape is what google-cloud-compute sends and reads, and what Google's reference says
(https://cloud.google.com/compute/docs/reference/rest/v1); it was never compared with the real service. Everything
advances when it is looked at, by ``clock``, so a test may let time pass.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from tests.lab import gce_disks
from tests.lab.gce_filter import Refused, Resource, fingerprint, matches, public

Key = tuple[str, str, str]
"""(scope, collection, name); scope: ``global``, ``regions/…`` or ``zones/…``."""
PowerOff = Callable[[], None]

STOCKOUT = (
    "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS",
    503,
    "The zone does not have enough resources available to fulfill the request.  '(resource type:compute)'.",
)
QUOTA = ("QUOTA_EXCEEDED", 403, "Quota 'CPUS' exceeded.  Limit: 24.0 in region us-central1.")


@dataclass
class Fault:
    """What goes wrong with the next calls that match.

    ``stockout`` and ``quota``: the operation ends so. ``late``: it ends with ``error``, after the thing was made.
    ``429``, ``503``, ``denied``, ``policy``: the call is refused. ``lost``: it does its work, then answers 502."""

    kind: str
    method: str = "*"
    """``insert``, ``delete``, ``get``, ``list``, ``patch``, or the last part of the path."""
    zone: str | None = None
    times: float = 1
    error: tuple[str, int, str] = ("INTERNAL_ERROR", 500, "Internal error.")
    permission: str = ""


@dataclass
class Operation:
    shown: Resource
    due: float
    apply: Callable[[], None] = lambda: None
    """Called once, when it is done and has no error."""
    error: tuple[str, int, str] | None = None


@dataclass
class GceState:
    project: str = "acme-prod-1"
    region: str = "us-central1"
    zones: tuple[str, ...] = ("us-central1-a", "us-central1-b", "us-central1-c")
    op_s: float = 0.02
    boot_s: float = 0.0
    delete_s: float = 0.02
    """Seconds that an insert, a boot and a delete take."""
    clock: Callable[[], float] = time.time
    boot: Callable[[Resource], PowerOff | None] = lambda _instance: None
    """Called once for each instance that boots; its result when the power goes."""
    remembers_s: float = 3600
    """How long a ``requestId`` is known."""
    images: set[str] = field(default_factory=lambda: {"debian-12", "gpu-image"})
    network: str = "10.128"
    """The first two bytes of machines' addresses."""
    first_address: int = 2
    """The last two of the first machine's."""
    console: Callable[[str], str] | None = None
    """What an instance's machine has printed, by its name; default: ``_console`` of the resource."""
    subnetworks: set[str] = field(default_factory=lambda: {"default"})
    machine_types: Callable[[str, str], bool] = lambda _zone, name: not name.startswith("zz-")
    """Whether a zone offers a type."""
    quotas: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"CPUS": (72.0, 4.0), "INSTANCES": (720.0, 1.0), "SSD_TOTAL_GB": (2048.0, 100.0)}
    )
    """Of the region, by metric: (limit, usage). Only told, never enforced: ``fail("quota")`` does that."""

    calls: Counter[str] = field(default_factory=Counter)
    """By method and collection, e.g. ``insert instances``; refused ones included."""
    boots: Counter[str] = field(default_factory=Counter)
    """By instance name."""

    def __post_init__(self) -> None:
        self.resources: dict[Key, Resource] = {}
        self.operations: dict[str, Operation] = {}
        self.faults: list[Fault] = []
        self._replays: dict[str, tuple[Operation, float]] = {}
        self._numbers = itertools.count(10**18)
        self._addresses = itertools.count(self.first_address)
        self._power: dict[str, PowerOff | None] = {}

    # -- names

    def link(self, scope: str, collection: str, name: str) -> str:
        return f"https://www.googleapis.com/compute/v1/projects/{self.project}/{scope}/{collection}/{name}"

    def key(self, link: str) -> Key:
        """Of a full or partial link to a resource."""
        scope, collection, name = link.split(f"projects/{self.project}/")[-1].rsplit("/", 2)
        return scope, collection, name

    def at(self, link: str) -> Resource | None:
        return self.resources.get(self.key(link))

    def held(self, key: Key) -> Resource:
        try:
            return self.resources[key]
        except KeyError:
            path = "/".join(key)
            raise Refused(404, "notFound", f"The resource 'projects/{self.project}/{path}' was not found") from None

    # -- what goes wrong

    def fault(self, kinds: tuple[str, ...], method: str, zone: str | None) -> Fault | None:
        """The next fault of one of these kinds that hits this call; it is used up."""
        for f in self.faults:
            if f.kind in kinds and f.method in ("*", method) and f.zone in (None, zone) and f.times > 0:
                f.times -= 1
                return f
        return None

    # -- operations

    def replay(self, path: str, request_id: str) -> Operation | None:
        if not request_id:
            return None
        try:
            if uuid.UUID(request_id).int == 0:
                raise ValueError
        except ValueError:
            raise Refused(400, "invalid", "Invalid value for field 'requestId': must be a UUID.") from None
        found = self._replays.get(f"{path} {request_id}")
        return found[0] if found is not None and self.clock() < found[1] else None

    def operate(
        self,
        kind: str,
        key: Key,
        *,
        takes_s: float | None = None,
        apply: Callable[[], None] = lambda: None,
        error: tuple[str, int, str] | None = None,
        path: str = "",
        request_id: str = "",
    ) -> Operation:
        number, now = str(next(self._numbers)), self.clock()
        name = f"operation-{number}" if "." not in kind else f"systemevent-{number}"
        scope = key[0]
        shown = {
            "kind": "compute#operation",
            "id": number,
            "name": name,
            "operationType": kind,
            "status": "PENDING",
            "progress": 0,
            "targetLink": self.link(*key),
            "user": "heliostat@acme.iam.gserviceaccount.com",
            "insertTime": self.stamp(),
            "selfLink": self.link(scope, "operations", name),
        }
        if scope != "global":
            place = f"https://www.googleapis.com/compute/v1/projects/{self.project}/{scope}"
            shown["zone" if scope.startswith("zones/") else "region"] = place
        if request_id:
            shown["clientOperationId"] = request_id
        op = Operation(shown, now + (self.op_s if takes_s is None else takes_s), apply, error)
        self.operations[name] = op
        if request_id:
            self._replays[f"{path} {request_id}"] = (op, now + self.remembers_s)
        self.advance()
        return op

    def advance(self) -> None:
        """Brings everything up to now."""
        now = self.clock()
        for op in list(self.operations.values()):
            if op.shown["status"] == "DONE":
                continue
            op.shown |= {"status": "RUNNING", "startTime": op.shown["insertTime"]}
            if now < op.due:
                continue
            op.shown |= {"status": "DONE", "progress": 100, "endTime": self.stamp()}
            if op.error is not None:
                code, status, message = op.error
                op.shown["error"] = {"errors": [{"code": code, "message": message}]}
                op.shown |= {"httpErrorStatusCode": status, "httpErrorMessage": "REFUSED"}
            else:
                op.apply()
        for (scope, collection, name), found in list(self.resources.items()):
            if collection != "instances" or found["status"] != "RUNNING":
                continue
            if name not in self._power and now >= found["_boots_at"]:
                self.boots[name] += 1
                self._power[name] = None
                self._power[name] = self.boot(found)
            most = found.get("scheduling", {}).get("maxRunDuration")
            if most is not None and now >= found["_made_at"] + int(most["seconds"]):
                self.end((scope, collection, name), "compute.instances.systemTerminate", delete=True)

    # -- instances

    def add_instance(self, key: Key, body: Resource) -> None:
        scope = key[0]
        asked = (body.get("networkInterfaces") or [{}])[0].get("networkIP")
        interface = {"networkIP": asked or gce_disks.internal(self), "name": "nic0"}
        self.resources[key] = {
            **body,
            "kind": "compute#instance",
            "id": str(next(self._numbers)),
            "status": "PROVISIONING",
            "creationTimestamp": self.stamp(),
            "selfLink": self.link(*key),
            "zone": self.link("zones", "", "").replace("zones//", scope),
            "labelFingerprint": fingerprint(body.get("labels")),
            "networkInterfaces": [{**(body.get("networkInterfaces") or [{}])[0], **interface}],
            "_made_at": self.clock(),
            "_console": "",
        }

    def started(self, key: Key) -> None:
        found = self.resources.get(key)
        if found is not None and found["status"] == "PROVISIONING":
            found |= {"status": "RUNNING", "_boots_at": self.clock() + self.boot_s}

    def end(self, key: Key, kind: str, *, delete: bool = False) -> None:
        """It ends by itself, e.g. with ``compute.instances.preempted`` or ``compute.instances.guestTerminate``."""
        self.power_off(key[2])
        if delete:
            self.resources.pop(key, None)
        elif key in self.resources:
            self.resources[key]["status"] = "TERMINATED"
        self.operate(kind, key, takes_s=0)

    def preempt(self, name: str) -> None:
        """As Google takes a spot machine back."""
        key, found = next((k, r) for k, r in self.resources.items() if k[1:] == ("instances", name))
        action = found.get("scheduling", {}).get("instanceTerminationAction")
        self.end(key, "compute.instances.preempted", delete=action == "DELETE")

    def stop_itself(self, name: str) -> None:
        """As ``shutdown -h now`` inside."""
        self.end(next(k for k in self.resources if k[1:] == ("instances", name)), "compute.instances.guestTerminate")

    def power_off(self, name: str) -> None:
        off = self._power.get(name)
        self._power[name] = None
        if off is not None:
            off()

    def remove(self, key: Key) -> None:
        if self.resources.pop(key, None) is not None and key[1] == "instances":
            self.power_off(key[2])

    # -- lists

    def found(self, collection: str, scope: str | None, wanted: str) -> Iterator[tuple[str, Resource]]:
        if collection == "operations":
            every = [(self.key(o.shown["selfLink"]), o.shown) for o in self.operations.values()]
        else:
            every = [(key, r) for key, r in sorted(self.resources.items()) if key[1] == collection]
        for key, r in every:
            if scope in (None, key[0]) and matches(r, wanted):
                yield key[0], public(gce_disks.shown(self, key, r))

    def stamp(self) -> str:
        """RFC 3339 in Google's own time zone, as the real ones are."""
        return datetime.fromtimestamp(self.clock() - 8 * 3600, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "-08:00"
