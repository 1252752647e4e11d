"""How many nodes there should be: one head, and workers by the groups' bounds and the autoscaler's wishes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from temporalio import workflow
from temporalio.exceptions import ApplicationError

with workflow.unsafe.imports_passed_through():
    from heliostat.models.clusters import NodeRole, NodeState
    from heliostat.models.compute_configs import MAX_NODES_PER_CLUSTER
    from runtime.messages.clusters import ClusterInput, LimitsUpdate, NodeFact
    from workflows.clusters.launching import Launching
    from workflows.clusters.progress import ClusterProgress
    from workflows.clusters.state import HEAD, ClusterData
    from workflows.entity.recorder import Recorder


class Scaling:
    def __init__(
        self,
        request: ClusterInput,
        state: ClusterData,
        recorder: Recorder,
        progress: ClusterProgress,
        launching: Launching,
    ) -> None:
        self._input = request
        self._s = state
        self._recorder = recorder
        self._progress = progress
        self._launching = launching

    def reconcile(self, now: datetime) -> None:
        if self._s.head is None and self._heads_ended():
            self._launching.request(NodeRole.HEAD, HEAD, now)
        # Workers boot at the same time and wait for its address; while a lost head is fenced there is none to join.
        if self._s.head is not None:
            self._reconcile_workers(now)

    def _heads_ended(self) -> bool:
        """The old head's machine has ended: two heads of one cluster must never live at once."""
        return all(n.role != NodeRole.HEAD or n.state == NodeState.TERMINATED for n in self._s.nodes.values())

    def _reconcile_workers(self, now: datetime) -> None:
        for group in self._s.bounds:
            for node in self._s.surplus(group):
                self._progress.give_up(node, "not needed any more")
            for _ in range(self._s.wanted(group) - len(self._s.staying(group))):
                self._launching.request(NodeRole.WORKER, group, now)
        self._s.remove = [node_id for node_id in self._s.remove if node_id in self._s.nodes]

    def set_desired(self, fact: NodeFact) -> None:
        """Absolute counts from Ray's autoscaler; the bounds apply here, not there."""
        wanted, remove = _desired(fact.data)
        wanted = {g: n for g, n in wanted.items() if g in self._s.bounds}
        remove = [n for n in remove if n in self._s.nodes]
        if wanted != self._s.desired or remove:
            text = ", ".join(f"{g} {n}" for g, n in sorted(wanted.items()))
            self._recorder.event("scale", f"autoscaler wants {text}", actor=f"agent:{fact.node_id}")
        self._s.desired = wanted
        self._s.remove += [n for n in remove if n not in self._s.remove]

    def set_limits(self, request: LimitsUpdate) -> None:
        """The head learns them from the records, in the answer to its next report."""
        bounds = self._s.bounds[request.group]
        if request.min_nodes is not None:
            bounds.min_nodes = request.min_nodes
        if request.max_nodes is not None:
            bounds.max_nodes = request.max_nodes
        text = f"{request.group}: {bounds.min_nodes} to {bounds.max_nodes} nodes"
        self._recorder.event("limits_changed", text, actor=request.actor)

    def validate_limits(self, request: LimitsUpdate) -> None:
        bounds = self._s.bounds.get(request.group)
        if bounds is None:
            known = ", ".join(self._s.bounds) or "none"
            raise ApplicationError(
                f"cluster {self._input.name} has no worker group {request.group!r}; it has: {known}", type="not_found"
            )
        low = bounds.min_nodes if request.min_nodes is None else request.min_nodes
        high = bounds.max_nodes if request.max_nodes is None else request.max_nodes
        if low > high:
            raise ApplicationError(f"min_nodes ({low}) is greater than max_nodes ({high})", type="invalid_request")
        if high < 1:
            raise ApplicationError(
                "max_nodes must be at least 1; min_nodes 0 lets a group shrink to none", type="invalid_request"
            )
        total = high + sum(b.max_nodes for g, b in self._s.bounds.items() if g != request.group)
        if total > MAX_NODES_PER_CLUSTER:
            raise ApplicationError(
                f"max_nodes would add up to {total}; one cluster may have {MAX_NODES_PER_CLUSTER}",
                type="invalid_request",
            )
        if self._s.terminate is not None or self._s.phase.settled:
            raise ApplicationError(f"cluster {self._input.name} is ending", type="conflict")


def _desired(data: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Counts by group and nodes to end, as a node reported them. What is not valid is left out: an exception in a
    handler would stop the workflow."""
    counts, remove = data.get("desired"), data.get("remove")
    wanted = {str(g): n for g, n in counts.items() if type(n) is int} if isinstance(counts, dict) else {}
    return wanted, [n for n in remove if isinstance(n, str)] if isinstance(remove, list) else []
