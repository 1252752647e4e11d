"""Machines of a Google Cloud project: instances of Compute Engine.

Calls: a launch is one ``instances.insert``; what all launches under way wait for, one list of operations a second
tells. ``describe``, ``find`` and ``list_owned`` are one or two lists for a batch. Compute Engine has no delete for
several: ``terminate`` is one list and one delete each, side by side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

from clouds.contract.errors import BadConfig, Gone, NoCapacity, NotOffered, QuotaExceeded
from clouds.contract.machines import OWNER_TAG, Machine, MachineSpec, MachineState
from clouds.gcp.account import errors
from clouds.gcp.account.operations import done, label, reached
from clouds.gcp.account.session import Session, matching, name_of
from clouds.gcp.machines import instance, orphans
from clouds.gcp.machines.catalogue import Catalogue, MachineType, shipped
from clouds.gcp.machines.choice import chosen
from clouds.gcp.machines.combined import Combined
from clouds.gcp.machines.history import NAMES_A_QUESTION, History, MachineHistory
from clouds.gcp.machines.retained import RetainedState, RetainedStore
from heliostat.errors import CloudError
from heliostat.models.clouds import Capabilities, GcpConfig, Market
from heliostat.models.common import utcnow

LAUNCH_WAIT_S = 40.0
"""For the operations' ends, which tell of a stockout. The launch's activity has a minute
(``workflows.policies.LAUNCH``); a machine whose operation takes longer is given as PENDING."""
POLL_S = 1.0
DELETES_AT_ONCE = 16
CONSOLE_TAIL_BYTES = 16 * 1024

_MISSING = ("machineTypes/", "acceleratorTypes/", "Machine type with name", "Accelerator type")


class GcpMachines:
    """Instances (``clouds.contract.machines.Machines``). A machine's id is its name, which its token gives.

    Args:
        config: where machines go.
        session: of the same project.
        installation_id: ours; ``forget_ended`` deletes only what carries it.
        tags: labels of everything that is made, besides ours, e.g. the organization's.
        types: what is chosen for what a node asks for; default: the catalogue that ships with us.
        poll_s: between two looks at an operation.
        clock: now; it must be the cloud's within ``history.LAG_S``.

    Where this differs from other clouds: of a machine that was deleted, only the operations on it are left, so it is
    described without node, cluster and tags, and what they were is not compared when its token is used again.
    """

    def __init__(
        self,
        config: GcpConfig,
        session: Session,
        installation_id: str,
        *,
        tags: Mapping[str, str] | None = None,
        types: Catalogue | None = None,
        poll_s: float = POLL_S,
        clock: Callable[[], datetime] = utcnow,
    ) -> None:
        self._config, self._session, self._tags = config, session, dict(tags or {})
        self._installation_id, self._poll_s, self._clock = installation_id, poll_s, clock
        self._types = (types or shipped()).only(config.instance_types)
        self._history = History(session)
        self._retained = RetainedStore(config, session, installation_id, self._tags, poll_s)
        self._listed = Combined(self._list_names, NAMES_A_QUESTION)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            markets=list(Market),
            zones=list(self._config.zones),
            instance_types=self._config.instance_types,
            max_cpu_per_node=self._types.max_cpu,
            max_memory_per_node=self._types.max_memory,
            max_gpu_per_node=self._types.max_gpu,
            keeps=True,
        )

    def launch(self, spec: MachineSpec) -> Machine:
        """``zone`` None: the config's zones in their order. ``PREFER_SPOT``: all zones for SPOT first.

        Each placement has a request id of its own for each attempt. The next one is tried only when the operation of
        the one before has failed, so two launchers of one token make the same calls and one machine."""
        kind = chosen(spec, self._config, self._types)
        name = instance.name_for(spec.token)
        history = self._history.of([name]).get(name, MachineHistory())
        deadline = time.monotonic() + LAUNCH_WAIT_S
        if history.insert is not None:
            return self._settled(spec, history.insert, deadline)
        retained = self._retained.prepare(spec, spec.keep) if spec.keep else None
        placements = [p for p in self._placements(spec) if retained is None or retained.may_be_in(p[0])]
        tried = [_attempts(spec, placement, history.failed) for placement in placements]
        refused: list[CloudError] = []
        for placement, attempt in zip(placements, tried, strict=True):
            if attempt > min(tried):
                continue  # it was asked already, in a round that broke off
            if refused and time.monotonic() > deadline:
                raise CloudError(
                    f"{len(refused)} of {len(placements)} placements have no machine for node {spec.node_id}; "
                    "the deadline has passed.",
                    remedy="Try again: it continues with the next placement.",
                    resource=spec.node_id,
                )
            try:
                return self._settled(spec, self._insert(spec, kind, *placement, attempt, retained), deadline)
            except errors.Exists:
                return self._launched(spec)
            except (NoCapacity, QuotaExceeded) as e:
                refused.append(e)
        raise _of(refused, spec)

    def describe(self, machine_ids: Iterable[str]) -> list[Machine]:
        """Those that are not there any more are described by the operations on them, as long as those are kept."""
        names = [i for i in dict.fromkeys(machine_ids) if instance.NAME.fullmatch(i)]
        listed = self._listed.get(names)
        ended = [n for n in names if n not in listed or _state(listed[n]) is MachineState.GONE]
        histories = self._history.of(ended)
        found = []
        for name in names:
            history = histories.get(name, MachineHistory())
            if name in listed:
                found.append(instance.machine(listed[name], history.reason))
            elif (machine := history.machine(name, self._clock())) is not None:
                found.append(machine)
        return found

    def find(self, token: str) -> Machine | None:
        return self._one(instance.name_for(token))

    def list_owned(self, installation_id: str) -> list[Machine]:
        found = (instance.machine(i) for i in self._owned(installation_id))
        return [machine for machine in found if machine.state is not MachineState.GONE]

    def terminate(self, machine_ids: Iterable[str]) -> None:
        """Also deletes what has stopped itself. A machine whose insert is under way may not be listed yet: ``describe``
        tells that it is PENDING, and the call is to be repeated."""
        names = [i for i in set(machine_ids) if instance.NAME.fullmatch(i)]
        listed = self._listed.get(names)
        self._delete([i for i in listed.values() if i.labels.get(OWNER_TAG)])

    def forget_ended(self, older_than_s: float) -> list[str]:
        """Deletes the machines of this installation that have stopped themselves, however lately: they cost money for
        their disks, and the operations on them remain. Nothing else is kept for us."""
        stopped = [i for i in self._owned(self._installation_id) if _state(i) is MachineState.GONE]
        self._delete(stopped)
        return [i.name for i in stopped]

    def attach_retained(self, cluster_id: str, machine_id: str | None) -> None:
        if machine_id is None:
            self._retained.release(cluster_id)
        else:
            self._retained.attach(cluster_id, machine_id)

    def delete_orphans(
        self, installation_id: str, older_than_s: float, lives: Callable[[str], bool] = lambda cluster_id: True
    ) -> list[str]:
        before = self._clock() - timedelta(seconds=older_than_s)
        return orphans.clear(self._session, self._retained, installation_id, before, lives)

    def console_output(self, machine_id: str) -> str:
        """The serial port's. Gone with the machine."""
        if not instance.NAME.fullmatch(machine_id):
            return ""
        found = self._listed.get([machine_id]).get(machine_id)
        if found is None:
            return ""
        where = {"zone": name_of(found.zone), "instance": machine_id, "port": 1}
        try:
            output = self._session.call(
                "Instances", "get_serial_port_output", where, "read a machine's serial port", machine_id
            )
        except Gone:
            return ""
        return str(output.contents)[-CONSOLE_TAIL_BYTES:]

    # -- inside

    def _placements(self, spec: MachineSpec) -> list[tuple[str, Market]]:
        zones = [spec.zone] if spec.zone is not None else self._config.zones
        markets = [Market.SPOT, Market.ON_DEMAND] if spec.market is Market.PREFER_SPOT else [spec.market]
        return [(zone, market) for market in markets for zone in zones]

    def _insert(
        self,
        spec: MachineSpec,
        kind: MachineType,
        zone: str,
        market: Market,
        attempt: int,
        retained: RetainedState | None,
    ) -> Any:
        """The operation, which may be that of an earlier call."""
        more = self._retained.for_insert(spec, retained, kind, zone) if retained is not None else {}
        try:
            return self._session.call(
                "Instances",
                "insert_unary",
                {
                    "zone": zone,
                    "instance_resource": instance.request(spec, self._config, kind, zone, market, self._tags, **more),
                    "request_id": instance.request_id(spec.token, zone, market, attempt),
                },
                f"launch node {spec.node_id} ({kind.name}, {zone}, {market})",
                spec.node_id,
            )
        except (Gone, BadConfig) as e:
            if any(part in e.message for part in _MISSING) and kind.name in shipped().types:
                raise NotOffered(
                    f"Zone {zone} does not offer {kind.name}: {e.message}",
                    remedy="Try another zone or type.",
                    resource=spec.node_id,
                ) from e
            if isinstance(e, Gone):  # what the request names is not there
                raise BadConfig(e.message, remedy="Change the cloud's config.", resource=spec.node_id) from e
            raise

    def _settled(self, spec: MachineSpec, op: Any, deadline: float) -> Machine:
        """The machine, when its operation has ended well or takes too long. Raises what the operation failed for."""
        name = name_of(op.target_link)
        wait = min(self._poll_s, 0.1)
        while not done(op) and time.monotonic() < deadline:
            time.sleep(wait)
            wait = min(wait * 2, self._poll_s)
            inserts = self._history.of([name]).get(name, MachineHistory()).inserts
            op = next((o for o in inserts if o.name == op.name), op)
        doing = f"launch node {spec.node_id} in zone {name_of(op.zone)}"
        failed = errors.operation_error(op, doing, spec.node_id) if done(op) else None
        if isinstance(failed, Gone):
            raise BadConfig(failed.message, remedy="Change the cloud's config.", resource=spec.node_id)
        if failed is not None:
            raise failed
        return self._launched(spec)

    def _launched(self, spec: MachineSpec) -> Machine:
        """The token's machine. Raises BadConfig if another request launched it."""
        name = instance.name_for(spec.token)
        listed = self._listed.get([name]).get(name)
        if listed is not None and listed.labels.get(instance.REQUEST_LABEL) != instance.digest(spec):
            raise BadConfig.same_token(name, spec.node_id)
        if listed is not None and _state(listed) is not MachineState.GONE:
            return instance.machine(listed)
        found = self._one(name)
        if found is None:
            raise CloudError(f"Google Cloud does not show machine {name} yet.", remedy="Try again.")
        return found

    def _one(self, name: str) -> Machine | None:
        return next(iter(self.describe([name])), None)

    def _list_names(self, names: list[str]) -> dict[str, Any]:
        return {i.name: i for i in self._list(matching("name", names))}

    def _owned(self, installation_id: str) -> list[Any]:
        if label(installation_id) != installation_id:
            return []
        return self._list(f'labels.{OWNER_TAG} = "{installation_id}"')

    def _list(self, wanted: str) -> list[Any]:
        """In all zones of the project. Without ``return_partial_success``: what a zone that is away has, is not
        gone."""
        pages = self._session.call("Instances", "aggregated_list", {"filter": wanted}, "list machines")
        return [i for _, page in pages for i in reached(page).instances]

    def _delete(self, instances: list[Any]) -> None:
        """Asks for all of them, then raises what the first that failed did."""

        def delete(one: Any) -> None:
            where = {"zone": name_of(one.zone), "instance": one.name}
            try:
                self._session.call("Instances", "delete_unary", where, f"delete machine {one.name}", one.name)
            except (Gone, errors.InUse):
                pass  # it is gone, or is being made or ended: who waits for its end asks again

        if instances:
            with ThreadPoolExecutor(min(DELETES_AT_ONCE, len(instances))) as pool:
                answers = [pool.submit(delete, one) for one in instances]
            for answer in answers:
                answer.result()


def _attempts(spec: MachineSpec, placement: tuple[str, Market], failed: set[str]) -> int:
    """How often that placement has failed."""
    attempt = 0
    while instance.request_id(spec.token, *placement, attempt) in failed:
        attempt += 1
    return attempt


def _state(listed: Any) -> MachineState:
    return instance.STATES.get(listed.status, MachineState.PENDING)


def _of(refused: list[CloudError], spec: MachineSpec) -> CloudError:
    """The error when no placement has a machine: that of the last one, and the others' messages. A type that no zone
    offers is a bad request, but another zone may still be wanted."""
    last = refused[-1]
    if len(refused) == 1:
        return last
    kinds = {type(e) for e in refused}
    cls = kinds.pop() if len(kinds) == 1 else NoCapacity if NoCapacity in kinds else QuotaExceeded
    said = " ".join(e.message for e in refused)
    return cls(said, remedy=last.remedy, resource=spec.node_id, details={"attempts": len(refused)})
