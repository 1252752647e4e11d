"""The state of one cluster, and the questions that it answers by itself. Pure, so that it is tested without Temporal.

All of it goes through continue-as-new as one object. Node entries are dropped once they have ended; the records keep
them.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from pydantic import field_validator

from activities.nodes import BootFacts
from heliostat.models.agents import GroupConfig
from heliostat.models.clouds import Market
from heliostat.models.clusters import Activity, ClusterState, NodeRole, NodeState
from heliostat.models.common import Condition, Result
from heliostat.models.compute_configs import ComputeConfig, NodeConfig, resources_of
from runtime.messages.common import TerminateRequest
from workflows.clusters.placement import Placement, Shortage

HEAD = "head"
"""The head's group."""

LIVE = (NodeState.REQUESTED, NodeState.LAUNCHED, NodeState.REGISTERED, NodeState.RUNNING)


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
    """The cloud's interruption notice for its machine."""
    taken_at: datetime | None = None
    """When the cloud takes the machine, by the notice. Of a head: None again once that has been checked."""
    boot: BootFacts | None = None
    launching: bool = False
    """A launch is in progress: its machine is not known yet."""
    asked: bool = False
    """A launch was requested at least once: its machine, if any, is found by ``token``."""
    ending: bool = False
    """Its machine is being ended."""
    not_before: datetime | None = None
    """Back-off after earlier failures of this slot."""
    asked_at: datetime | None = None
    """When its launch began."""
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
    def label(self) -> str:
        """For people."""
        return f"{self.group} node {self.slot}.{self.generation}"

    @property
    def place(self) -> Placement:
        return Placement(zone=self.zone, market=self.market, instance_type=self.instance_type, kept=self.kept)


class Bounds(Result):
    min_nodes: int
    max_nodes: int


AGENT_TO_REGISTER = "the head's agent to register (usually 1 s locally, a minute on a cloud)"
OLD_HEAD_TO_END = "the old head's machine to end"
REWORDED = {
    "the head's agent to call (usually 1 s locally, a minute on a cloud)": AGENT_TO_REGISTER,
    "the old head's machine to be gone": OLD_HEAD_TO_END,
}
"""Texts of ``waits_for`` that an older release wrote. Danger: without this, a run that continued with such a text takes
the new one for a change, and its replay writes the records once more than its history did."""


class ClusterData(Result):
    """Times are workflow time. It goes from one run of the workflow to the next, and may come from an older release:
    the names of its fields stay, and an unknown field is ignored."""

    phase: ClusterState = ClusterState.STARTING
    reason: str = "requested"
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
    """Slots used so far; 0 is the head's."""
    free_slots: dict[str, list[int]] = {"head": [0]}
    """Group → slots that a new node may take, with the next generation."""
    generations: dict[str, int] = {}
    """Slot → machines requested so far."""
    failures: dict[str, int] = {}
    """Group → failed launches in a row."""
    deaths: dict[str, int] = {}
    """Group → nodes in a row that died soon after they were up."""
    shortages: dict[str, Shortage] = {}
    """By ``Placement.key``."""
    bounds: dict[str, Bounds] = {}
    desired: dict[str, int] = {}
    remove: list[str] = []
    """Nodes that the autoscaler has drained and no longer wants."""
    leases: dict[str, datetime] = {}
    leases_checked_at: datetime | None = None
    activity: Activity = Activity.UNKNOWN
    idle_since: datetime | None = None
    head_generation: int = 0
    head_running_at: datetime | None = None
    ray_version: str | None = None
    keeps: bool = False
    """Retained resources may exist; they are deleted when the machines have ended."""
    kept_in: str | None = None
    """Their zone, once a head has used them: later heads go there; "": the cloud knows."""
    head_losses: list[datetime] = []
    terminate: TerminateRequest | None = None
    end_state: ClusterState = ClusterState.TERMINATED
    seen: list[str] = []
    commands: int = 0
    """Commands sent so far: part of the next one's id."""

    @field_validator("waits_for")
    @classmethod
    def _reword(cls, text: str) -> str:
        return REWORDED.get(text, text)

    @property
    def head(self) -> NodeEntry | None:
        """The current head, if one is requested and not lost or ending."""
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
        """Live workers without an interruption notice: those that count against what is wanted."""
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
        """Workers beyond what is wanted: those that the autoscaler named, then those that do not run yet, then the
        newest."""
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

    def take_slot(self, group: str) -> int:
        """A slot for a new node of this group, under its next generation."""
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
        """What a starting cluster waits for, for people."""
        late = [n for n in self.nodes.values() if n.live and n.not_before and n.not_before > now]
        blocked = self.conditions.get("CapacityAvailable")
        if late and blocked is not None and not blocked.status:
            at = min(n.not_before for n in late if n.not_before)
            return f"machines ({blocked.reason}: {blocked.message}); next try {at:%H:%M:%S} UTC"
        head = self.head
        if head is None:
            return OLD_HEAD_TO_END
        if head.state != NodeState.RUNNING:
            where = f" ({head.place})" if blocked is not None and not blocked.status else ""
            return {
                NodeState.REQUESTED: f"the cloud to accept the head's machine{where}",
                NodeState.LAUNCHED: AGENT_TO_REGISTER,
                NodeState.REGISTERED: "Ray to start on the head (usually 5 to 10 s)",
            }[head.state]
        missing = {
            group: bounds.min_nodes - sum(1 for n in self.workers(group) if n.state == NodeState.RUNNING)
            for group, bounds in self.bounds.items()
        }
        text = ", ".join(f"{count} of {group}" for group, count in missing.items() if count > 0)
        return f"workers to join: {text}" if text else ""

    def idle_deadline(self, config: ComputeConfig) -> datetime | None:
        """When idle shutdown is due, as known now; None while the cluster is in use."""
        if self.phase != ClusterState.RUNNING or self.leases or not config.idle_termination_minutes:
            return None
        if self.activity != Activity.IDLE or self.idle_since is None:
            return None
        return self.idle_since + timedelta(minutes=config.idle_termination_minutes)

    def uptime_deadline(self, config: ComputeConfig) -> datetime | None:
        if config.maximum_uptime_minutes is None:
            return None
        return self.started_at + timedelta(minutes=config.maximum_uptime_minutes)


def node_config(config: ComputeConfig, group: str) -> NodeConfig:
    return config.head_node if group == HEAD else (config.group(group) or NodeConfig())


def group_config(config: ComputeConfig, group: str, bounds: Bounds | None) -> GroupConfig:
    """What the agent of a node in this group is given."""
    node = node_config(config, group)
    return GroupConfig(
        name=group,
        resources=resources_of(node),
        labels=node.labels,
        min_nodes=bounds.min_nodes if bounds else 0,
        max_nodes=bounds.max_nodes if bounds else 0,
    )
