"""The state of one cluster, as its workflow holds it, and the decisions that need no I/O.

Everything here is pure: it takes ``now`` and returns what to do, so that it is tested without Temporal.
All of it goes through continue-as-new as one object; node entries are dropped once they have ended (the
records keep them).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from activities.nodes import BootFacts
from heliostat.models.clouds import Market
from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
from heliostat.models.common import Condition, Result
from heliostat.models.compute_configs import ComputeConfig, NodeConfig
from runtime.messages.common import TerminateRequest
from workflows import policies

LIVE = (NodeState.REQUESTED, NodeState.LAUNCHED, NodeState.REGISTERED, NodeState.RUNNING)


class Place(Result):
    """Where and how one machine may be launched."""

    zone: str | None = None
    market: Market = Market.ON_DEMAND
    instance_type: str | None = None
    kept: bool = False
    """For a head that has something of the one before: what such a place lacks, it may have for others."""

    @property
    def key(self) -> str:
        return f"{self.market}/{self.zone or ''}/{self.instance_type or ''}{'/kept' if self.kept else ''}"

    def __str__(self) -> str:
        where = f" in {self.zone}" if self.zone else ""
        return f"{self.instance_type or 'a machine'}{where} ({self.market})"


class Shortage(Result):
    """A place that had no machine when one was last asked for there."""

    times: int = 0
    """In a row; many launches that were under way at once count as one."""
    since: datetime
    until: datetime
    """Other places are asked before that."""
    final: bool = False
    """It never has: waiting does not help."""


class NodeEntry(Result):
    id: str
    role: NodeRole
    group: str
    slot: int
    generation: int
    token: str
    zone: str | None = None
    market: Market = Market.ON_DEMAND
    instance_type: str | None = None
    kept: bool = False
    state: NodeState = NodeState.REQUESTED
    reason: str = ""
    notice: str = ""
    """What the cloud has announced for its machine: that it will be taken back."""
    taken_at: datetime | None = None
    """By when, as announced. Of a head: until the cloud was asked after it then."""
    boot: BootFacts | None = None
    launching: bool = False
    """A launch is under way: what it makes is not known yet."""
    asked: bool = False
    """A launch was asked for at least once: its machine, if any, is found by ``token``."""
    ending: bool = False
    """Its end is under way."""
    not_before: datetime | None = None
    """Back-off after earlier failures of this slot."""
    asked_at: datetime | None = None
    """When its launch was begun."""
    machine_id: str | None = None
    ip: str | None = None
    created_at: datetime
    launched_at: datetime | None = None
    registered_at: datetime | None = None
    running_at: datetime | None = None
    ended_at: datetime | None = None

    @property
    def live(self) -> bool:
        return self.state in LIVE

    @property
    def place(self) -> Place:
        return Place(zone=self.zone, market=self.market, instance_type=self.instance_type, kept=self.kept)


class Bounds(Result):
    min_nodes: int
    max_nodes: int


class ClusterData(Result):
    """See the fields. Times are workflow time. It goes from one run of the workflow to the next, and may come from an
    older release: a field that is no more is passed over."""

    phase: ClusterState = ClusterState.STARTING
    reason: str = "asked for"
    cause: str = ""
    waits_for: str = ""
    state_since: datetime
    started_at: datetime
    phase_deadline: datetime | None = None
    conditions: dict[str, Condition] = {}
    phase_seconds: dict[str, float] = {}
    revision: int = 0
    nodes: dict[str, NodeEntry] = {}
    slots: int = 1
    """Slots handed out so far; 0 is the head's."""
    free_slots: dict[str, list[int]] = {"head": [0]}
    """Group → slots that a new node may take, with the next generation."""
    generations: dict[str, int] = {}
    """Slot → machines asked for so far."""
    failures: dict[str, int] = {}
    """Group → launches in a row that came to nothing."""
    deaths: dict[str, int] = {}
    """Group → nodes in a row that died soon after they were up."""
    shortages: dict[str, Shortage] = {}
    """By a place's key."""
    bounds: dict[str, Bounds] = {}
    desired: dict[str, int] = {}
    remove: list[str] = []
    """Nodes that the autoscaler has drained and wants ended."""
    leases: dict[str, datetime] = {}
    leases_checked_at: datetime | None = None
    activity: Activity = Activity.UNKNOWN
    idle_since: datetime | None = None
    head_generation: int = 0
    head_running_at: datetime | None = None
    ray_version: str | None = None
    keeps: bool = False
    """Something that heads hand on may have been made; it is deleted when the machines are gone."""
    kept_in: str | None = None
    """Its zone, once a head had it: heads go there; "": the cloud knows."""
    head_losses: list[datetime] = []
    terminate: TerminateRequest | None = None
    end_state: ClusterState = ClusterState.TERMINATED
    seen: list[str] = []
    commands: int = 0
    """Commands given so far: part of the next one's id."""

    @property
    def head(self) -> NodeEntry | None:
        """The current head, if one is asked for and not lost or ending."""
        return next((n for n in self.nodes.values() if n.role == NodeRole.HEAD and n.live), None)

    def workers(self, group: str | None = None) -> list[NodeEntry]:
        """Live workers, oldest first."""
        found = [
            n
            for n in self.nodes.values()
            if n.role == NodeRole.WORKER and n.live and (group is None or n.group == group)
        ]
        return sorted(found, key=lambda n: n.slot)

    def staying(self, group: str) -> list[NodeEntry]:
        """Live workers that their cloud has not announced to take back: what counts against what is wanted."""
        return [n for n in self.workers(group) if not n.notice]

    def wanted(self, group: str) -> int:
        bounds = self.bounds[group]
        return max(bounds.min_nodes, min(self.desired.get(group, bounds.min_nodes), bounds.max_nodes))

    @property
    def ready(self) -> bool:
        return self.phase == ClusterState.RUNNING

    def workers_ready(self) -> bool:
        """Every group's minimum is alive."""
        return all(
            sum(1 for n in self.workers(group) if n.state == NodeState.RUNNING) >= bounds.min_nodes
            for group, bounds in self.bounds.items()
        )

    def surplus(self, group: str) -> list[NodeEntry]:
        """Workers beyond what is wanted: those that the autoscaler named, then those that are not up yet, then
        the newest."""
        named = [n for n in self.workers(group) if n.id in self.remove]
        rest = [n for n in self.staying(group) if n not in named]
        over = len(rest) - self.wanted(group)
        if over <= 0:
            return named
        rest.sort(key=lambda n: (n.state == NodeState.RUNNING, -n.slot))
        return named + rest[:over]

    def condition(self, kind: str, status: bool, now: datetime, reason: str = "", message: str = "") -> None:
        old = self.conditions.get(kind)
        since = old.since if old is not None and old.status == status else now
        self.conditions[kind] = Condition(type=kind, status=status, reason=reason, message=message, since=since)

    def short(self, places: list[Place], asked_at: datetime, now: datetime, *, final: bool) -> bool:
        """Notes that these have no machine for a launch that was begun at ``asked_at``; False: that is known already,
        from one that was under way beside it."""
        news = False
        for place in places:
            old = self.shortages.get(place.key)
            if old is not None and old.since >= asked_at:
                continue
            times = (old.times if old is not None else 0) + 1
            until = now + policies.cool_down(times)
            self.shortages[place.key] = Shortage(times=times, since=now, until=until, final=final)
            news = True
        return news

    def pick(self, places: list[Place], now: datetime) -> tuple[Place, datetime | None]:
        """The first place that is not known to be short, so that the best one is returned to after its cool-down. When
        all are: they are walked again in the same order, with a back-off, whose end is given."""
        for place in places:
            known = self.shortages.get(place.key)
            if known is None or (known.until <= now and not known.final):
                return place, None
        hopeful = [p for p in places if not self.shortages[p.key].final] or places
        place = min(hopeful, key=lambda p: self.shortages[p.key].times)
        known = self.shortages[place.key]
        at = known.since + policies.backoff(known.times)
        return place, at if at > now else None

    def hopeless(self, places: list[Place]) -> bool:
        """None of them will ever have a machine."""
        known = [self.shortages.get(place.key) for place in places]
        return all(shortage is not None and shortage.final for shortage in known)

    def take_slot(self, group: str) -> int:
        """A slot for a new node of this group; its generation is counted up."""
        free = self.free_slots.get(group)
        if free:
            slot = free.pop(0)
        else:
            slot, self.slots = self.slots, self.slots + 1
        self.generations[str(slot)] = self.generations.get(str(slot), 0) + 1
        return slot

    def free_slot(self, node: NodeEntry) -> None:
        free = self.free_slots.setdefault(node.group, [])
        if node.slot not in free:
            free.append(node.slot)
            free.sort()

    def waiting_text(self, now: datetime) -> str:
        """What a starting cluster waits for, in words for a person."""
        late = [n for n in self.nodes.values() if n.live and n.not_before and n.not_before > now]
        blocked = self.conditions.get("CapacityAvailable")
        if late and blocked is not None and not blocked.status:
            at = min(n.not_before for n in late if n.not_before)
            return f"machines ({blocked.reason}: {blocked.message}); next try {at:%H:%M:%S} UTC"
        head = self.head
        if head is None:
            return "the old head's machine to be gone"
        if head.state != NodeState.RUNNING:
            where = f" ({head.place})" if blocked is not None and not blocked.status else ""
            return {
                NodeState.REQUESTED: f"the cloud to accept the head's machine{where}",
                NodeState.LAUNCHED: "the head's agent to call (usually 1 s locally, a minute on a cloud)",
                NodeState.REGISTERED: "Ray to start on the head (usually 5 to 10 s)",
            }[head.state]
        missing = {
            group: bounds.min_nodes - sum(1 for n in self.workers(group) if n.state == NodeState.RUNNING)
            for group, bounds in self.bounds.items()
        }
        text = ", ".join(f"{count} of {group}" for group, count in missing.items() if count > 0)
        return f"workers to join: {text}" if text else ""

    def idle_deadline(self, config: ComputeConfig) -> datetime | None:
        """When idle shutdown is due, as known now; None while anything holds the cluster awake."""
        if self.phase != ClusterState.RUNNING or self.leases or not config.idle_termination_minutes:
            return None
        if self.activity != Activity.IDLE or self.idle_since is None:
            return None
        return self.idle_since + timedelta(minutes=config.idle_termination_minutes)

    def uptime_deadline(self, config: ComputeConfig) -> datetime | None:
        if config.maximum_uptime_minutes is None:
            return None
        return self.started_at + timedelta(minutes=config.maximum_uptime_minutes)


def desired_of(data: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Counts by group and nodes to end, of a fact that a node sent: what is not of that form is left out, for an
    exception in a handler would stop the workflow."""
    counts, remove = data.get("desired"), data.get("remove")
    wanted = {str(g): n for g, n in counts.items() if type(n) is int} if isinstance(counts, dict) else {}
    return wanted, [n for n in remove if isinstance(n, str)] if isinstance(remove, list) else []


def moment_of(value: Any) -> datetime | None:
    """A time that a node sent; None where it is none."""
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return at if at.tzinfo else None


def resources_of(config: NodeConfig) -> dict[str, float]:
    """What Ray on the node is told it has: ``resources``, else what the machine must have, else one CPU."""
    resources: dict[str, float] = {}
    if config.required_resources is not None:
        resources["CPU"] = config.required_resources.CPU
        if config.required_resources.memory:
            resources["memory"] = config.required_resources.memory
        if config.required_resources.GPU:
            resources["GPU"] = config.required_resources.GPU
    if config.resources is not None:
        resources.update(config.resources)
    resources.setdefault("CPU", 1)
    return resources
