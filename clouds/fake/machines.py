"""A cloud in memory, with knobs for everything that goes wrong on a real one. For tests and benchmarks."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256

from clouds.contract.bucket import StoredObject
from clouds.contract.errors import BadConfig, Denied, Gone, NoCapacity, QuotaExceeded, Throttled
from clouds.contract.machines import CLUSTER_TAG, NODE_TAG, OWNER_TAG, Machine, MachineSpec, MachineState
from clouds.contract.object_keys import checked
from clouds.fake.retained import FakeRetainedStore
from clouds.signed_urls import SignedUrls
from heliostat.errors import CloudError
from heliostat.models.clouds import Capabilities, Market
from heliostat.models.common import utcnow

PowerOff = Callable[[], None]
Boot = Callable[[MachineSpec, Machine], PowerOff | None]
"""Called once for each machine that boots; what it gives back is called once when that machine's power goes."""

FAKE_CAPABILITIES = Capabilities(markets=list(Market), zones=["zone-a", "zone-b", "zone-c"], keeps=True)


@dataclass
class _Shortage:
    left: float
    zone: str | None
    instance_type: str | None
    market: Market | None
    error: type[CloudError] = NoCapacity

    def hits(self, spec: MachineSpec) -> bool:
        wanted = ((self.zone, spec.zone), (self.instance_type, spec.instance_type), (self.market, spec.market))
        return self.left > 0 and all(mine in (None, theirs) for mine, theirs in wanted)


@dataclass
class _Fake:
    spec: MachineSpec
    machine_id: str
    ip: str
    launched_at: datetime
    stopping_at: datetime | None = None
    reason: str = ""
    booted: bool = False
    power_off: PowerOff | None = None
    dark: bool = False
    """Its power is off, and ``power_off`` was called."""


@dataclass
class FakeMachines:
    """Machines that are entries in a table (``clouds.contract.machines.Machines``). The fields and methods
    below are knobs and
    may be turned at any time, from any thread; ``times`` counts calls, None is for ever.

    ``boot`` is called for each machine, in the thread of the call that launched it, and may start a fake agent.
    """

    can: Capabilities = field(default_factory=lambda: FAKE_CAPABILITIES)
    clock: Callable[[], datetime] = utcnow
    sleep: Callable[[float], None] = time.sleep
    boot: Boot | None = None

    boot_s: float = 0
    """PENDING for this long, by the clock."""
    stop_s: float = 0
    """STOPPING for this long after terminate."""
    dies_after_s: float | None = None
    """Machines end by themselves so long after their launch; seen at the next call."""
    latency_s: dict[str, float] = field(default_factory=dict)
    """By method name; ``*``: all the others."""
    quota: int | None = None
    """How many machines may live."""
    bad_config: str = ""
    """Every launch is refused for good, for this reason."""
    denied: str = ""
    """Every call is refused, for this reason."""
    console: str = "fake: booted\n"

    calls: Counter[str] = field(default_factory=Counter)
    """By method name, failed ones included."""
    boots: Counter[str] = field(default_factory=Counter)
    """By token; more than 1 is a double launch."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._machines: dict[str, _Fake] = {}
        self._numbers = itertools.count(1)
        self._lit: dict[str, _Fake] = {}  # those whose power is on
        self._shortages: list[_Shortage] = []
        self._throttled = self._unregistered = 0.0
        self._lost: dict[str, float] = {}
        self.retained = FakeRetainedStore(self._state)

    # -- knobs that count

    def no_capacity(
        self,
        times: int | None = None,
        *,
        zone: str | None = None,
        instance_type: str | None = None,
        market: Market | None = None,
        error: type[CloudError] = NoCapacity,
    ) -> None:
        """The next launches that match find no machine. ``error``: or are refused with that, e.g. NotOffered."""
        self._shortages.append(_Shortage(_count(times), zone, instance_type, market, error))

    def restock(self) -> None:
        """Ends every shortage."""
        self._shortages.clear()

    def throttle(self, times: int | None) -> None:
        """The next calls of any method are refused as too many."""
        self._throttled = _count(times)

    def lose_answers(self, times: int | None, method: str = "launch") -> None:
        """The next calls do their work and then fail as a broken connection does."""
        self._lost[method] = _count(times)

    def never_register(self, times: int | None) -> None:
        """The next machines run but nothing boots on them."""
        self._unregistered = _count(times)

    def kill(self, machine_id: str, reason: str = "the cloud reclaimed the machine") -> None:
        """That machine has ended now, as a reclaimed spot machine has."""
        with self._lock:
            found = self._machines[machine_id]
            found.reason, found.stopping_at = reason, datetime.min.replace(tzinfo=self.clock().tzinfo)
        self._settle()

    # -- the contract

    def capabilities(self) -> Capabilities:
        return self.can

    def launch(self, spec: MachineSpec) -> Machine:
        with self._call("launch"):
            machine_id = f"fake-{sha256(spec.token.encode()).hexdigest()[:32]}"
            with self._lock:
                found = self._machines.get(machine_id)
                if found is not None and found.spec != spec:
                    raise BadConfig.same_token(machine_id, spec.node_id)
                if found is None:
                    retained = self.retained.prepare(spec, self.can.zones, self.clock())
                    self._refuse(spec)
                    number = next(self._numbers)
                    any_ip = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
                    ip = retained.ip if retained and retained.ip else any_ip
                    found = _Fake(spec, machine_id, ip, self.clock())
                    self._machines[machine_id] = self._lit[machine_id] = found
                    found.booted = self._unregistered < 1
                    self._unregistered = max(0, self._unregistered - 1)
                    starts = found.booted
                else:
                    starts = False
                machine = self._machine(found)
            if starts:
                self.boots[spec.token] += 1
                power_off = self.boot(spec, machine) if self.boot is not None else None
                with self._lock:
                    found.power_off, late = power_off, found.dark
                if late and power_off is not None:  # it was ended while it booted
                    power_off()
            return machine

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        with self._call("describe"), self._lock:
            return [self._machine(self._machines[i]) for i in machine_ids if i in self._machines]

    def find(self, token: str) -> Machine | None:
        with self._call("find"), self._lock:
            found = self._machines.get(f"fake-{sha256(token.encode()).hexdigest()[:32]}")
            return None if found is None else self._machine(found)

    def list_owned(self, installation_id: str) -> list[Machine]:
        with self._call("list_owned"), self._lock:
            ours = (m for m in self._machines.values() if m.spec.installation_id == installation_id)
            return [machine for m in ours if (machine := self._machine(m)).state is not MachineState.GONE]

    def terminate(self, machine_ids: Iterable[str]) -> None:
        with self._call("terminate"):
            with self._lock:
                for machine_id in machine_ids:
                    found = self._machines.get(machine_id)
                    if found is not None and found.stopping_at is None:
                        found.stopping_at, found.reason = self.clock(), "terminated"
            self._settle()

    def forget_ended(self, older_than_s: float) -> list[str]:
        with self._call("forget_ended"), self._lock:
            before = self.clock() - timedelta(seconds=older_than_s)
            forgotten = []
            for machine_id, held in self._machines.items():
                ended = max(held.stopping_at or held.launched_at, held.launched_at)
                if self._machine(held).state is MachineState.GONE and ended < before:
                    forgotten.append(machine_id)
            for machine_id in forgotten:
                del self._machines[machine_id]
            return forgotten

    def attach_retained(self, cluster_id: str, machine_id: str | None) -> None:
        with self._call("attach_retained"), self._lock:
            if machine_id is None:
                self.retained.release(cluster_id)
            elif machine_id in self._machines:
                self.retained.attach(self._machines[machine_id].spec, machine_id)
            else:
                raise Gone(f"Machine {machine_id} is not there any more.")

    def delete_orphans(
        self, installation_id: str, older_than_s: float, lives: Callable[[str], bool] = lambda cluster_id: True
    ) -> list[str]:
        with self._call("delete_orphans"):
            held = list(self.retained.held)
        over = [cluster_id for cluster_id in held if not lives(cluster_id)]  # outside of the lock: it asks somebody
        with self._lock:
            return self.retained.clear(self.clock() - timedelta(seconds=older_than_s), lambda c: c not in over)

    def console_output(self, machine_id: str) -> str:
        with self._call("console_output"), self._lock:
            found = self._machines.get(machine_id)
            return self.console if found is not None and found.booted else ""

    # -- inside

    @contextmanager
    def _call(self, method: str) -> Iterator[None]:
        self.sleep(self.latency_s.get(method, self.latency_s.get("*", 0)))
        with self._lock:
            self.calls[method] += 1
            if self._throttled >= 1:
                self._throttled -= 1
                raise Throttled(f"The fake cloud takes no more calls now ({method}).", remedy="Try again later.")
            if self.denied:
                raise Denied(f"The fake cloud denies {method}: {self.denied}", remedy="Grant the right.")
        self._settle()
        yield
        with self._lock:
            if self._lost.get(method, 0) >= 1:
                self._lost[method] -= 1
                raise CloudError(f"The answer of {method} was lost.", remedy="Try again: the call is repeatable.")

    def _refuse(self, spec: MachineSpec) -> None:
        if self.bad_config:
            raise BadConfig(f"The fake cloud refuses node {spec.node_id}: {self.bad_config}", resource=spec.node_id)
        if spec.market not in self.can.markets or (spec.zone is not None and spec.zone not in self.can.zones):
            raise BadConfig(
                f"The fake cloud has no market {spec.market} or no zone {spec.zone}.",
                remedy="Change the compute config.",
                resource=spec.node_id,
            )
        types = self.can.instance_types
        if types is not None and spec.instance_type is not None and spec.instance_type not in types:
            raise BadConfig(
                f"The fake cloud has no instance type {spec.instance_type!r}.",
                remedy=f"Use one of {', '.join(types)}.",
                resource=spec.node_id,
            )
        short = next((s for s in self._shortages if s.hits(spec)), None)
        if short is not None:
            short.left -= 1
            raise short.error(
                f"The fake cloud has no machine for node {spec.node_id} (type {spec.instance_type}, zone {spec.zone}).",
                remedy="Try another zone, type or market, or wait.",
                resource=spec.node_id,
            )
        if self.quota is not None and len(self._lit) >= self.quota:
            raise QuotaExceeded(f"The fake cloud's quota is {self.quota} machines.", remedy="Wait, or raise it.")

    def _settle(self) -> None:
        """Turns the power off where it is due; outside of the lock, for ``power_off`` is the test's own code."""
        due: list[_Fake] = []
        with self._lock:
            now = self.clock()
            for m in self._lit.values():
                age = (now - m.launched_at).total_seconds()
                if m.stopping_at is None and self.dies_after_s is not None and age >= self.dies_after_s:
                    m.stopping_at, m.reason = datetime.min.replace(tzinfo=now.tzinfo), "the machine has died"
                if m.stopping_at is not None and not m.dark:
                    m.dark = True
                    due.append(m)
            for m in due:
                del self._lit[m.machine_id]
        for m in due:
            if m.power_off is not None:
                m.power_off()

    def _state(self, machine_id: str) -> MachineState:
        found = self._machines.get(machine_id)
        return self._machine(found).state if found is not None else MachineState.GONE

    def _machine(self, m: _Fake) -> Machine:
        now = self.clock()
        if m.stopping_at is not None:
            gone = (now - m.stopping_at).total_seconds() >= self.stop_s
            state = MachineState.GONE if gone else MachineState.STOPPING
        else:
            up = (now - m.launched_at).total_seconds() >= self.boot_s
            state = MachineState.RUNNING if up else MachineState.PENDING
        ours = {OWNER_TAG: m.spec.installation_id, CLUSTER_TAG: m.spec.cluster_id, NODE_TAG: m.spec.node_id}
        return Machine(
            machine_id=m.machine_id,
            node_id=m.spec.node_id,
            cluster_id=m.spec.cluster_id,
            state=state,
            ip=m.ip,
            launched_at=m.launched_at,
            reason=m.reason,
            tags=m.spec.tags | ours,
        )


class FakeBucket(SignedUrls):
    """Objects in memory (``clouds.contract.bucket.Bucket``). Its URLs work once
    ``clouds.local.bucket.server.create_app`` serves it at ``url``. ``quota_bytes`` simulates a full disk."""

    def __init__(self, url: str = "http://fake-bucket.invalid", *, quota_bytes: int | None = None) -> None:
        super().__init__(url, b"fake")
        self.quota_bytes = quota_bytes
        self._objects: dict[str, tuple[bytes, datetime]] = {}

    def put(self, key: str, data: bytes) -> None:
        with self.incoming(key) as incoming:
            incoming.write(data)

    @contextmanager
    def incoming(self, key: str) -> Iterator[_FakeIncoming]:
        checked(key)
        incoming = _FakeIncoming(self, key)
        yield incoming
        incoming.commit()

    def get(self, key: str) -> bytes:
        with self.open(key) as f:
            return f.read()

    def open(self, key: str) -> io.BytesIO:
        checked(key)
        if key not in self._objects:
            raise Gone(
                f"Object {key} does not exist.",
                remedy="It may have been deleted by the retention policy.",
                resource=key,
            )
        return io.BytesIO(self._objects[key][0])

    def stat(self, key: str) -> StoredObject | None:
        found = self._objects.get(key)
        return None if found is None else StoredObject(key=key, size=len(found[0]), modified_at=found[1])

    def list(self, prefix: str, start_after: str = "") -> list[StoredObject]:
        keys = sorted(k for k in list(self._objects) if k.startswith(prefix) and k > start_after)
        return [found for key in keys if (found := self.stat(key)) is not None]

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._objects.pop(key, None)

    def store(self, key: str, data: bytes) -> None:
        others = sum(len(found) for name, (found, _) in list(self._objects.items()) if name != key)
        if self.quota_bytes is not None and others + len(data) > self.quota_bytes:
            raise QuotaExceeded(f"The bucket is full: {key} cannot be written.", remedy="Free space.", resource=key)
        self._objects[key] = (data, utcnow())


class _FakeIncoming:
    def __init__(self, bucket: FakeBucket, key: str) -> None:
        self._bucket, self._key, self._data = bucket, key, bytearray()

    @property
    def size(self) -> int:
        return len(self._data)

    def write(self, data: bytes) -> None:
        self._data += data

    def sha256(self) -> str:
        return sha256(self._data).hexdigest()

    def commit(self) -> None:
        self._bucket.store(self._key, bytes(self._data))


def _count(times: int | None) -> float:
    return float("inf") if times is None else times
