"""The state of one service, as its workflow holds it, and the decisions that need no I/O.

Everything here is pure, so that it is tested without Temporal. All of it goes through continue-as-new as one object:
what a version's applications are stands in the records, never here.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from clouds.contract.balancer import Backend
from heliostat.models.clusters import ClusterState
from heliostat.models.common import Condition, Result
from heliostat.models.services import ServiceState, ServiceVersionState
from runtime.messages.common import TerminateRequest
from runtime.messages.services import DeployRequest, GateTokens, VersionSpec

SEEN_MAX = 500
"""Event and deploy ids remembered against a second delivery; see ``workflows.clusters.state.SEEN_MAX``."""

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
    """The cluster was asked for; before that there is nothing to end."""
    state: ClusterState = ClusterState.STARTING
    ready: bool = False
    reason: str = ""
    revision: int = 0
    head_node_id: str | None = None
    asked_at: datetime | None = None
    failures: int = 0
    """Clusters in a row that came to nothing."""
    not_before: datetime | None = None
    deploy_id: str = ""
    """Command by which Serve's newest config was given."""
    given: str = ""
    """What that command gave (``Slot.key``)."""
    taken: bool = False
    """Serve took it."""
    http: str = ""
    grpc: str = ""
    healthy: bool = False
    """By Serve's word on ``deploy_id``."""
    failed: bool = False
    message: str = ""
    probed: str = ""
    """``given`` as it was when real requests through the endpoint were answered."""
    open_on: str | None = None
    """The head on which it was found fit for traffic: it keeps its traffic while it is updated in place."""
    gate: str = ""
    """The tokens (``gate_key``) that its proxies go by; "draining" after a drain."""
    notice: str = ""
    """What the cloud has announced for its present head's machine: that it will be taken back."""
    relieves: int = 0
    """Of a relief: the number of the slot that it is to take the place of."""

    def wanted(self, version_id: str, capacity: int | None) -> str:
        """What Serve on the present head should be given."""
        return f"{version_id}/{self.head_node_id}/{capacity}"

    def fit(self, version_id: str) -> bool:
        """Real requests to this version on the present head were answered, Serve still calls it healthy, and its proxy
        turns nobody away."""
        return self.healthy and self.probed_here(version_id) and self.gate != "draining"

    def probed_here(self, version_id: str) -> bool:
        """The same, whatever Serve says now; also with another capacity."""
        return self.ready and self.taken and self.probed.startswith(f"{version_id}/{self.head_node_id}/")

    def serves(self, version_id: str) -> bool:
        """It is fit, or it was and is being given another capacity or config while what it had answers on."""
        return self.fit(version_id) or (self.open and not self.failed and self.probed != self.given)

    @property
    def open(self) -> bool:
        """May have traffic."""
        return self.ready and bool(self.http) and self.open_on is not None and self.open_on == self.head_node_id

    def forgive(self) -> None:
        """What failed with an earlier config says nothing of the next one."""
        self.failed, self.message, self.not_before = False, "", None

    def lose_head(self) -> None:
        """What ran on the head is gone."""
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
    """Clusters that come up beside these, each for one whose head's machine is to be taken back: see
    ``service_notices``. The version is fit, or not, without them."""
    leaving: list[Slot] = []
    """Clusters that were relieved: out of the load balancer, to be drained and released."""
    capacity: int | None = None
    """Serve's target capacity, percent; None: all of it."""
    checklist: dict[str, Condition] = {}
    kept_until: datetime | None = None
    had_traffic: bool = False
    recalled: bool = False
    """It is wanted again while it is drained."""
    releasing: bool = False
    """Too late for that."""
    replaced_by: str = ""
    """The version that took its clusters over in place."""
    ended_at: datetime | None = None

    @property
    def tended(self) -> list[Slot]:
        """What is given the version."""
        return [*self.slots, *self.relief]

    @property
    def held(self) -> list[Slot]:
        """What may have a cluster."""
        return [*self.slots, *self.relief, *self.leaving]

    @property
    def fit(self) -> bool:
        return bool(self.slots) and all(slot.fit(self.spec.id) for slot in self.slots)

    @property
    def serves(self) -> bool:
        """Fit, or being given another capacity while what it has answers on."""
        return bool(self.slots) and all(slot.serves(self.spec.id) for slot in self.slots)

    @property
    def failure(self) -> str:
        """Serve's word that it has given up an application, "" if there is none."""
        return next((s.message or "Serve gave it up" for s in self.slots if s.failed), "")

    def condition(self, kind: str, status: bool, now: datetime, reason: str, message: str = "") -> bool:
        """Whether it changed."""
        old = self.checklist.get(kind)
        if old is not None and (old.status, old.reason, old.message) == (status, reason, message):
            return False
        since = old.since if old is not None and old.status == status else now
        self.checklist[kind] = Condition(type=kind, status=status, reason=reason, message=message, since=since)
        return True


class RolloutKind(StrEnum):
    STEPS = "steps"
    """New clusters, weights by steps."""
    IN_PLACE = "in_place"
    WEIGHTS = "weights"
    """Static weights of several versions."""


class RolloutData(Result):
    kind: RolloutKind
    deploy_id: str
    actor: str
    version_ids: list[str]
    """The versions that are to be fit before any traffic moves; ``STEPS`` and ``IN_PLACE`` have one."""
    base: dict[str, int] = {}
    """Weights before: what it goes back to."""
    target: dict[str, int] = {}
    """``WEIGHTS`` only."""
    steps: list[int] = []
    percent: int = 0
    stop_at: int | None = None
    """Pause at this share."""
    surge: int = 100
    back: bool = False
    """It brings the version before back: no steps, no canary."""
    paused: bool = False
    held: bool = False
    """The present step was held to its end."""
    skip: bool = False
    """A person has promoted it: the present step's hold is over."""
    since: datetime
    health_deadline: datetime
    deadline: datetime
    holds_until: datetime | None = None
    paused_at: datetime | None = None
    observed: str = ""
    doing: str = "starting"
    """``starting``, ``shifting``, ``holding``, ``paused``, ``completing``, ``going back``."""
    end: str = ""
    """Why it is to go back; "" while it is not."""
    failed: bool = False
    """It goes back because the new version is at fault, which is then kept for inspection."""

    @property
    def version_id(self) -> str:
        return self.version_ids[0]

    @property
    def canaried(self) -> bool:
        """The new version has a share that is measured against those before."""
        return self.kind == RolloutKind.STEPS and bool(self.base) and not self.back and 0 < self.percent < 100

    @property
    def beside(self) -> bool:
        """The new version's share is watched beside the passage, which does not itself: see ``_watch_beside``."""
        moving = self.doing == "shifting" and self.surge < 100 and not self.end
        return self.canaried and (self.paused or moving)

    def resume(self, now: datetime) -> None:
        """The rollout's own time stood still while it was paused."""
        if self.paused and self.paused_at is not None:
            self.deadline += now - self.paused_at
            self.health_deadline += now - self.paused_at
        self.paused, self.paused_at = False, None

    def next_step(self) -> int | None:
        """The next share to go to; None: it is at its end or where it is to stop."""
        last = 100 if self.stop_at is None else min(self.stop_at, 100)
        if self.percent >= last:
            return None
        return next((min(step, last) for step in self.steps if step > self.percent), last)

    def weights(self) -> dict[str, int]:
        """At ``percent``: the new version's share, and the others' in proportion."""
        rest = shares(self.base, 100 - self.percent)
        return {v: w for v, w in {**rest, self.version_id: self.percent}.items() if w or v == self.version_id}


def shares(parts: dict[str, int], total: int) -> dict[str, int]:
    """``total`` divided in proportion to ``parts``, in whole numbers that sum to it (largest remainders)."""
    whole = sum(parts.values())
    if not whole:
        return dict.fromkeys(parts, 0)
    exact = {k: total * v / whole for k, v in parts.items()}
    found = {k: int(v) for k, v in exact.items()}
    left = total - sum(found.values())
    for k in sorted(exact, key=lambda k: (found[k] - exact[k], k))[:left]:
        found[k] += 1
    return found


class ServiceData(Result):
    """See the fields. Times are workflow time. It may come from an older release: see ``ClusterData``."""

    state: ServiceState = ServiceState.STARTING
    reason: str = "asked for"
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
    """Wanted now, by version."""
    url: str = ""
    backends: list[Backend] = []
    """What the load balancer was told last."""
    backends_revision: int = 0
    backends_unsure: bool = False
    """It was told others since, and failed over them: it may go by those, or go by them as soon as it is mended."""
    endpoint_trouble: str = ""
    """What of its load balancer can't be mended, by the monitor's last word."""
    endpoint_lost: bool = False
    """It is to be made again, or at least to be told its backends again."""
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
        """Of a life that begins under this revision of the records."""
        # What a life before this one told the load balancer is older, however often it did.
        return cls(state_since=now, revision=revision, backends_revision=revision << BACKENDS_BITS)

    def first_sight(self, event_id: str) -> bool:
        """Whether this event was not seen before; remembers it."""
        if event_id in self.seen:
            return False
        self.seen.append(event_id)
        del self.seen[:-SEEN_MAX]
        return True

    def slot_of(self, cluster_id: str) -> tuple[VersionData, Slot] | None:
        for version in self.versions.values():
            for slot in version.held:
                if slot.cluster_id == cluster_id:
                    return version, slot
        return None

    @property
    def gate_key(self) -> str:
        return f"{self.gate.enabled}:{','.join(sorted(self.gate.hashes))}"

    @property
    def gate_hashes(self) -> list[str]:
        """The hashes that every proxy takes which has traffic, or may have it as soon as a rollout's next step."""
        wanted = [v for v in self.versions.values() if self.weights.get(v.spec.id) or v.state in LIVING]
        open_slots = [s for v in wanted for s in v.tended if s.open]
        if not open_slots or any(s.gate != self.gate_key for s in open_slots):
            return []
        return self.gate.hashes

    def wanted_backends(self) -> list[Backend]:
        """All proxies that Serve runs on. One gets traffic only after it was found fit; the others are there for
        probes."""
        found: list[Backend] = []
        for version in self.versions.values():
            if self.terminate is not None or version.state == ServiceVersionState.TERMINATING:
                continue  # without even a health check, whose connections a drain would wait for
            for slot in version.tended:
                if slot.ready and slot.http and (slot.taken or slot.open):
                    # One that was drained and is wanted again may still turn idle connections away.
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

    def told_backends(self) -> bool:
        """The load balancer has what it should have."""
        return self.backends == self.wanted_backends() and not self.backends_unsure

    def applied(self, weights: dict[str, int]) -> bool:
        """The load balancer goes by these weights, as far as there are backends for them."""
        return self.weights == weights and self.told_backends()
