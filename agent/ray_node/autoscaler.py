"""Between Ray's autoscaler, which decides, and the control plane, which launches: the list of nodes for Ray's node
provider, and the desired number of workers by group.

Ray requests nodes one call at a time. The control plane gets absolute counts, which can be repeated without harm.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.boot import Boot
from agent.events import Events

log = logging.getLogger("agent.ray_node.autoscaler")
LISTED = ("REQUESTED", "LAUNCHED", "REGISTERED", "RUNNING")
PROVIDER_MODULE = "heliostat_node_provider"


def autoscaling_config(boot: Boot, cluster_name: str, groups: list[dict[str, Any]], server: str) -> dict[str, Any]:
    """Ray's cluster config. Without any of these keys Ray 2.60's monitor dies, and the head with it. Written as JSON,
    which is YAML."""
    types: dict[str, Any] = {
        "head": {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    }
    for group in groups:
        types[group["name"]] = {
            "resources": dict(group["resources"]),
            "labels": dict(group.get("labels") or {}),
            "node_config": {},
            "min_workers": int(group.get("min_nodes") or 0),
            "max_workers": int(group.get("max_nodes") or 0),
        }
    lists = ["cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
             "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
             "worker_start_ray_commands"]  # fmt: skip
    return {
        "cluster_name": cluster_name,
        "max_workers": sum(int(g.get("max_nodes") or 0) for g in groups),
        "upscaling_speed": boot.constants.upscaling_speed,
        "idle_timeout_minutes": boot.constants.idle_timeout_minutes,
        "provider": {
            "type": "external",
            "module": f"{PROVIDER_MODULE}.HeliostatNodeProvider",
            "agent": f"http://{server}",
            "token_path": str(boot.node_dir / "provider-token"),
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "head_node_type": "head",
        "available_node_types": types,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Atomic: the autoscaler reads the file again each second."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(config, indent=1))
    fresh.rename(path)


class Scaling:
    """All methods return at once, whether the control plane answers or not."""

    def __init__(
        self, boot: Boot, events: Events, groups: list[dict[str, Any]], desired: dict[str, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._boot = boot
        self._events = events
        self._clock = clock
        self._lock = threading.Lock()
        self.groups = {g["name"]: g for g in groups}
        self.desired = {name: int(desired.get(name, 0)) for name in self.groups}
        self._nodes: dict[str, dict[str, Any]] = {}
        self._requests: dict[str, list[tuple[str, float]]] = {name: [] for name in self.groups}
        """Launch requests without a node: (id, time), oldest first, by group."""
        self._launched_by: dict[str, str] = {}
        self._ended: set[str] = set()
        """Nodes that Ray has terminated; hidden from Ray until the control plane stops listing them."""
        self._lost: set[str] = set()
        self._event = ""
        self._hold_until = 0.0
        self._interrupted: dict[str, tuple[str, float]] = {}
        """Nodes that their cloud reclaims: group, and when they were last listed as such."""
        self._hidden_until: dict[str, float] = {}
        """Replacements of such nodes: until when they are hidden from Ray."""

    # -- from the control plane ---------------------------------------------------------------------------------

    def headroom(self, nodes: list[dict[str, Any]]) -> dict[str, int]:
        """How many nodes beyond its maximum Ray may see of each group: as many as their cloud reclaims, for their
        replacements start beside them. Without it Ray's autoscaler terminates each replacement. ``nodes``: of a
        report's answer, before ``update``. A node counts for a while after its end, for Ray lists nodes and reads its
        maxima at different times."""
        now = self._clock()
        with self._lock:
            for node in nodes:
                if node.get("leaving") and node["state"] in LISTED:
                    self._interrupted[node["id"]] = (node["group"], now)
            headroom_s = self._boot.constants.headroom_s
            self._interrupted = {
                i: (group, at) for i, (group, at) in self._interrupted.items() if now - at < headroom_s
            }
            counts: dict[str, int] = {}
            for group, _ in self._interrupted.values():
                counts[group] = counts.get(group, 0) + 1
            return counts

    def update(self, nodes: list[dict[str, Any]], desired: dict[str, int] | None) -> None:
        """A report's answer, after its acknowledgements, and after Ray's config has the ``headroom``."""
        with self._lock:
            fresh = {n["id"]: n for n in nodes}
            leaving = {group for group, _ in self._interrupted.values()}
            for node in nodes:
                if node["id"] not in self._nodes and node["state"] in LISTED:
                    self._hidden_until[node["id"]] = self._clock()
                    if node["group"] in leaving:  # a round of Ray's that started with the old maximum must not see it
                        self._hidden_until[node["id"]] += 1.5 * self._boot.constants.autoscaler_interval_s
            self._nodes = fresh
            for known in (self._ended, self._lost):
                known &= fresh.keys()
            self._launched_by = {i: r for i, r in self._launched_by.items() if i in fresh}
            self._hidden_until = {i: until for i, until in self._hidden_until.items() if i in fresh}
            self._assign_requests()
            if desired is not None:
                self._adopt_desired(desired)

    def _assign_requests(self) -> None:
        """Assigns new nodes to the oldest launch requests of their group."""
        for node_id in [i for i, until in self._hidden_until.items() if until <= self._clock()]:
            del self._hidden_until[node_id]
            waiting = self._waiting(self._nodes[node_id]["group"])
            if waiting:
                self._launched_by[node_id] = waiting.pop(0)[0]

    def _adopt_desired(self, desired: dict[str, int]) -> None:
        if self._event and self._events.is_pending(self._event):
            return  # the control plane does not have Ray's latest count yet
        if self._event:
            self._event, self._hold_until = "", self._clock() + self._boot.constants.desired_hold_s
        theirs = {name: int(desired.get(name, 0)) for name in self.groups}
        if theirs == self.desired or self._clock() >= self._hold_until:
            self.desired, self._hold_until = theirs, 0.0

    def set_groups(self, groups: list[dict[str, Any]]) -> None:
        with self._lock:
            self.groups = {g["name"]: g for g in groups}
            for name in self.groups:
                self.desired.setdefault(name, 0)
                self._requests.setdefault(name, [])

    def lost(self, node_id: str) -> bool:
        """Ray has lost this worker. False when Ray's autoscaler has terminated it before, the control plane is ending
        it, or its loss is known already."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node_id in self._ended or node_id in self._lost or (node and node["state"] not in LISTED):
                return False
            self._lost.add(node_id)
            return True

    def workers(self) -> dict[str, str]:
        """State by id of the workers that the control plane lists and Ray has not terminated."""
        with self._lock:
            return {i: n["state"] for i, n in self._nodes.items() if i not in self._ended and n["state"] in LISTED}

    # -- from Ray's autoscaler ----------------------------------------------------------------------------------

    def listed(self) -> list[dict[str, Any]]:
        """Nodes with Ray's tags, the head among them (without it the autoscaler never starts to scale)."""
        head = {"ray-node-type": "head", "ray-user-node-type": "head", "ray-node-status": "up-to-date",
                "ray-node-name": self._boot.node_id}  # fmt: skip
        found = [{"id": self._boot.node_id, "ip": self._boot.ip, "running": True, "tags": head}]
        with self._lock:
            self._assign_requests()
            unseen = self._ended | self._lost | self._hidden_until.keys()
            for node_id, node in self._nodes.items():
                if node["state"] not in LISTED or node_id in unseen:
                    continue
                tags = {"ray-node-type": "worker", "ray-user-node-type": node["group"], "ray-node-name": node_id,
                        "ray-node-status": "up-to-date" if node["state"] == "RUNNING" else "setting-up",
                        "ray-launch-request": self._launched_by.get(node_id, "")}  # fmt: skip
                running = node["state"] in ("REGISTERED", "RUNNING")
                found.append({"id": node_id, "ip": node.get("ip") or "", "running": running, "tags": tags})
        return found

    def create(self, group: str, count: int, request: str) -> None:
        """Ray requests ``count`` more of ``group``. A node that is missing already (lost, being replaced) is not
        requested a second time; the same request again (Ray retries) counts once."""
        with self._lock:
            if group not in self.groups:
                log.error("Ray requests %d of the unknown group %r; ignored", count, group)
                return
            waiting = [(r, t) for r, t in self._waiting(group) if not request or r != request]
            unseen = self._ended | self._lost | self._hidden_until.keys()
            live = sum(
                1 for i, n in self._nodes.items()
                if n["group"] == group and n["state"] in LISTED and not n.get("leaving") and i not in unseen
            )  # fmt: skip
            vacancies = max(0, self.desired[group] - live - len(waiting))
            most = int(self.groups[group].get("max_nodes") or 0)
            wanted = min(self.desired[group] + max(0, count - vacancies), max(most, self.desired[group]))
            waiting += [(request, self._clock())] * count
            self._requests[group] = waiting
            log.info(
                "Ray requests %d of %s: %d → %d desired (%d live)", count, group, self.desired[group], wanted, live
            )
            if wanted != self.desired[group]:
                self.desired[group] = wanted
                self._report_desired([])

    def terminate(self, ids: list[str]) -> None:
        """Ray terminates these workers. Ignores the head (Ray 2.60 requests its end at its own), unknown nodes and lost
        ones."""
        with self._lock:
            gone = []
            for node_id in dict.fromkeys(ids):
                node = self._nodes.get(node_id)
                if node is None or node_id == self._boot.node_id or node_id in self._ended:
                    continue
                self._ended.add(node_id)
                if node_id in self._lost:
                    continue  # the control plane has its loss and replaces it
                gone.append(node_id)
                group = node["group"]
                if group in self.desired and not node.get("leaving"):  # else its replacement is counted already
                    least = int(self.groups[group].get("min_nodes") or 0) if group in self.groups else 0
                    self.desired[group] = max(least, self.desired[group] - 1)
            if gone:
                log.info("Ray terminates %s: %s desired", gone, self.desired)
                self._report_desired(gone)

    def _waiting(self, group: str) -> list[tuple[str, float]]:
        oldest = self._clock() - self._boot.constants.launch_request_ttl_s
        self._requests[group] = [(r, t) for r, t in self._requests.get(group, []) if t > oldest]
        return self._requests[group]

    def _report_desired(self, remove: list[str]) -> None:
        self._event = self._events.add("desired", desired=dict(self.desired), remove=remove)
