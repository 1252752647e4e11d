"""The state of one service, as its workflow holds it, and the decisions that need no I/O.

Everything here is pure, so it is tested without Temporal. All of it goes through continue-as-new as one object, so a
field's name never changes. A version's applications are in the records, never here.
"""

from __future__ import annotations

from datetime import datetime

from clouds.contract.balancer import Backend
from heliostat.models.clusters import ClusterState
from heliostat.models.common import Condition, Result
from heliostat.models.services import ServiceState, ServiceVersionState
from runtime.messages.common import TerminateRequest
from runtime.messages.services import DeployRequest, GateTokens, VersionSpec
from workflows.entity.seen import first_sight
from workflows.services.rollout_state import RolloutData

ENDED_KEPT = 3
"""Ended versions that stay in the workflow's state: the previous one to roll back to, and what the newest deploys
became. The records keep all."""

BACKENDS_BITS = 20
"""A million changes of the weights in one life, from the records' revision of its beginning."""

LIVING = (ServiceVersionState.STARTING, ServiceVersionState.UPDATING, ServiceVersionState.RUNNING)


class Slot(Result):
    """One of a version's clusters. The cluster is replaced when it ends; its head when that is lost."""

    number: int
    cluster_id: str = ""
    made: bool = False
    """The cluster was requested; before that there is nothing to terminate."""
    state: ClusterState = ClusterState.STARTING
    ready: bool = False
    reason: str = ""
    revision: int = 0
    head_node_id: str | None = None
    asked_at: datetime | None = None
    failures: int = 0
    """Clusters in a row that failed."""
    not_before: datetime | None = None
    deploy_id: str = ""
    """Id of the command with Serve's newest config."""
    given: str = ""
    """What that command deployed (see ``wanted``)."""
    taken: bool = False
    """Serve has accepted it."""
    http: str = ""
    grpc: str = ""
    healthy: bool = False
    """By Serve's status of ``deploy_id``."""
    failed: bool = False
    message: str = ""
    probed: str = ""
    """``given`` as it was when its probes through the endpoint succeeded."""
    open_on: str | None = None
    """The head on which it was found fit for traffic: it keeps its traffic while it is updated in place."""
    gate: str = ""
    """The tokens (``gate_key``) that its proxies accept; "draining" after a drain."""
    notice: str = ""
    """The cloud's interruption notice for its current head's machine."""
    relieves: int = 0
    """Of a replacement: the number of the slot that it is to replace."""

    def wanted(self, version_id: str, capacity: int | None) -> str:
        """Key of what Serve on the current head should have."""
        return f"{version_id}/{self.head_node_id}/{capacity}"

    def fit(self, version_id: str) -> bool:
        """Fit for traffic: real requests to this version on the current head were answered, Serve still reports it
        healthy, and its proxy rejects nobody."""
        return self.healthy and self.probed_here(version_id) and self.gate != "draining"

    def probed_here(self, version_id: str) -> bool:
        """The probes have succeeded, whatever Serve reports now; also with another capacity."""
        return self.ready and self.taken and self.probed.startswith(f"{version_id}/{self.head_node_id}/")

    def serves(self, version_id: str) -> bool:
        """It is fit, or it was: it gets another capacity or config while what it had still answers."""
        return self.fit(version_id) or (self.open and not self.failed and self.probed != self.given)

    @property
    def open(self) -> bool:
        """May have traffic."""
        return self.ready and bool(self.http) and self.open_on is not None and self.open_on == self.head_node_id

    def clear_failure(self) -> None:
        """A failure with an earlier config says nothing about the next one."""
        self.failed, self.message, self.not_before = False, "", None

    def lose_head(self) -> None:
        """What ran on the head is lost."""
        self.deploy_id = self.given = self.http = self.grpc = self.message = self.probed = self.gate = ""
        self.taken = self.healthy = self.failed = False
        self.open_on = None

    def lose_cluster(self) -> None:
        self.lose_head()
        self.notice = ""
        self.cluster_id, self.made, self.ready, self.revision = "", False, False, 0
        self.head_node_id, self.state, self.asked_at = None, ClusterState.STARTING, None


class VersionData(Result):
    spec: VersionSpec
    state: ServiceVersionState = ServiceVersionState.STARTING
    reason: str = ""
    state_since: datetime
    slots: list[Slot] = []
    relief: list[Slot] = []
    """Replacement clusters, each for one whose head's machine the cloud will take back: see ``replacement``. Whether
    the version is fit does not depend on them."""
    leaving: list[Slot] = []
    """Clusters that were replaced: they leave the load balancer, are drained and released."""
    capacity: int | None = None
    """Serve's target capacity, percent; None: all of it."""
    checklist: dict[str, Condition] = {}
    kept_until: datetime | None = None
    had_traffic: bool = False
    recalled: bool = False
    """It is needed again while it is drained."""
    releasing: bool = False
    """Too late for that."""
    replaced_by: str = ""
    """The version that took its clusters over in place."""
    ended_at: datetime | None = None

    @property
    def deployed(self) -> list[Slot]:
        """Clusters that the version is deployed to."""
        return [*self.slots, *self.relief]

    @property
    def all_slots(self) -> list[Slot]:
        """All that may have a cluster."""
        return [*self.slots, *self.relief, *self.leaving]

    @property
    def fit(self) -> bool:
        return bool(self.slots) and all(slot.fit(self.spec.id) for slot in self.slots)

    @property
    def serves(self) -> bool:
        """Fit, or getting another capacity while what it has still answers."""
        return bool(self.slots) and all(slot.serves(self.spec.id) for slot in self.slots)

    @property
    def failure(self) -> str:
        """Why Serve failed to deploy an application; "" if it did not."""
        return next((s.message or "Serve reports a failed deployment" for s in self.slots if s.failed), "")

    def step_of(self, slot: Slot) -> str:
        """Name of the step that works on this slot: one at a time."""
        return f"cluster {slot.number} of {self.spec.name}"

    def condition(self, kind: str, status: bool, now: datetime, reason: str, message: str = "") -> bool:
        """Whether it changed."""
        old = self.checklist.get(kind)
        if old is not None and (old.status, old.reason, old.message) == (status, reason, message):
            return False
        since = old.since if old is not None and old.status == status else now
        self.checklist[kind] = Condition(type=kind, status=status, reason=reason, message=message, since=since)
        return True


class ServiceData(Result):
    """See the fields. Times are workflow time. It may come from an older release: see ``ClusterData``."""

    state: ServiceState = ServiceState.STARTING
    reason: str = "requested"
    waits_for: str = ""
    state_since: datetime
    revision: int = 0
    versions: dict[str, VersionData] = {}
    primary: str | None = None
    previous: str | None = None
    """The finished version that a rollback returns to."""
    rollout: RolloutData | None = None
    pending: list[DeployRequest] = []
    weights: dict[str, int] = {}
    """Target weights, by version."""
    url: str = ""
    backends: list[Backend] = []
    """What the load balancer has: those of the last update that succeeded."""
    backends_revision: int = 0
    backends_unsure: bool = False
    """An update since then failed: the load balancer may have applied it, or may apply it later."""
    endpoint_trouble: str = ""
    """The unrecoverable error of its load balancer, by the monitor's last message; "" for none."""
    endpoint_lost: bool = False
    """It must be created again, or at least be given its backends again."""
    gate: GateTokens = GateTokens()
    clusters_made: int = 0
    commands: int = 0
    terminate: TerminateRequest | None = None
    seen: list[str] = []
    idle_due: datetime | None = None
    partial: str = ""
    """On how many clusters it serves, when not on all."""

    @classmethod
    def begun(cls, now: datetime, revision: int) -> ServiceData:
        """Of a life that begins with this revision of the records."""
        # Every update of the load balancer in a life before this one has a lower revision.
        return cls(state_since=now, revision=revision, backends_revision=revision << BACKENDS_BITS)

    def first_sight(self, event_id: str) -> bool:
        """Whether this message is new; remembers it."""
        return first_sight(self.seen, event_id)

    def slot_of(self, cluster_id: str) -> tuple[VersionData, Slot] | None:
        for version in self.versions.values():
            for slot in version.all_slots:
                if slot.cluster_id == cluster_id:
                    return version, slot
        return None

    @property
    def gate_key(self) -> str:
        return f"{self.gate.enabled}:{','.join(sorted(self.gate.hashes))}"

    @property
    def gate_hashes(self) -> list[str]:
        """The hashes that all proxies accept which have traffic, or may get it with a rollout's next step."""
        wanted = [v for v in self.versions.values() if self.weights.get(v.spec.id) or v.state in LIVING]
        open_slots = [s for v in wanted for s in v.deployed if s.open]
        if not open_slots or any(s.gate != self.gate_key for s in open_slots):
            return []
        return self.gate.hashes

    def wanted_backends(self) -> list[Backend]:
        """All proxies that Serve runs on. A proxy gets traffic only after its probes succeeded; until then it is a
        backend for the probes' sake."""
        found: list[Backend] = []
        for version in self.versions.values():
            if self.terminate is not None or version.state == ServiceVersionState.TERMINATING:
                continue  # not even for health checks: a drain would wait for their connections
            for slot in version.deployed:
                if slot.ready and slot.http and (slot.taken or slot.open):
                    # A proxy whose drain was recalled may still close idle connections.
                    may = slot.open and slot.gate != "draining" and not slot.relieves
                    found.append(
                        Backend(
                            id=slot.cluster_id,
                            version_id=version.spec.id,
                            http=slot.http,
                            grpc=slot.grpc,
                            weight=self.weights.get(version.spec.id, 0) if may else 0,
                        )
                    )
        return sorted(found, key=lambda b: b.id)

    def backends_applied(self) -> bool:
        """The load balancer has the backends that it should have."""
        return self.backends == self.wanted_backends() and not self.backends_unsure

    def applied(self, weights: dict[str, int]) -> bool:
        """The load balancer has these weights, as far as there are backends for them."""
        return self.weights == weights and self.backends_applied()
