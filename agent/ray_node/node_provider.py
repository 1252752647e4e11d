"""Ray's node provider (external, v1 interface, which autoscaler v2 wraps): asks only the agent on
this machine. The agent copies this one file to a folder of its own on the head's PYTHONPATH, so it imports nothing of
the agent's.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from pathlib import Path
from typing import Any

from ray.autoscaler.node_provider import NodeProvider

logger = logging.getLogger(__name__)
TIMEOUT_S = 5


class HeliostatNodeProvider(NodeProvider):  # type: ignore[misc]
    """``provider_config``: ``agent`` (URL) and ``token_path``."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._nodes: dict[str, dict[str, Any]] = {}
        self._token = Path(provider_config["token_path"]).read_text().strip()
        # no proxy: the agent is on this machine
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        request = urllib.request.Request(  # noqa: S310 - the agent's own address, from the config it wrote
            self.provider_config["agent"] + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"},
        )
        with self._opener.open(request, timeout=TIMEOUT_S) as response:
            return dict(json.load(response))

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        self._nodes = {n["id"]: n for n in self._call("GET", "/nodes")["nodes"]}
        return [i for i, n in self._nodes.items() if all(n["tags"].get(k) == v for k, v in tag_filters.items())]

    def is_running(self, node_id: str) -> bool:
        return bool(self._nodes.get(node_id, {}).get("running"))

    def is_terminated(self, node_id: str) -> bool:
        return node_id not in self._nodes

    def node_tags(self, node_id: str) -> dict[str, str]:
        return dict(self._nodes.get(node_id, {}).get("tags", {}))

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        """Kept until the next listing only: the control plane decides what a node is, not Ray."""
        self._nodes.get(node_id, {}).get("tags", {}).update(tags)

    def internal_ip(self, node_id: str) -> str:
        return str(self._nodes.get(node_id, {}).get("ip", ""))

    def external_ip(self, node_id: str) -> str:
        return self.internal_ip(node_id)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        group = tags["ray-user-node-type"]
        logger.info("requesting %d of %s from the agent", count, group)
        self._call("POST", "/create", {"group": group, "count": count, "request": tags.get("ray-launch-request", "")})
        return {}

    def create_node_with_resources_and_labels(
        self,
        node_config: dict[str, Any],
        tags: dict[str, str],
        count: int,
        resources: dict[str, float],
        labels: dict[str, str],
    ) -> dict[str, Any]:
        return self.create_node(node_config, tags, count)

    def terminate_node(self, node_id: str) -> dict[str, Any]:
        return self.terminate_nodes([node_id])

    def terminate_nodes(self, node_ids: list[str]) -> dict[str, Any]:
        self._call("POST", "/terminate", {"ids": list(node_ids)})
        return {}

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config
