"""``python -m tests.lab python -m tests.lab.cost [PAIRS]``: two figures of the lab.

From a spot notice until a replacement is asked for, with a job running, on both vendors. And in pairs, what the control
plane adds to a cluster's launch on AWS: ``POST /v1/clusters`` until RUNNING with one worker, against the same hosts
started by hand: RunInstances for both, whose user-data is ``ray start`` with the very flags and environment of our
agent, until Ray says that both are alive. The cloud's own time (moto's pending state, the host's boot) and Ray's are in
both.
"""

from __future__ import annotations

import secrets
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from agent.boot import Boot, Ports
from agent.constants import Constants
from agent.ray_node.process import arguments, environment, token_path
from tests.e2e.support import Stack
from tests.e2e.test_lab_aws import TestAws
from tests.e2e.test_lab_gcp import TestGcp
from tests.lab.lab import Lab, until
from tests.lab.namespaces import ROOM
from tests.lab.scenarios import OnACloud
from tests.lab.site import Site

CONFIG = {
    "head_node": {"resources": {"CPU": 1}},
    "worker_nodes": [{"name": "w", "resources": {"CPU": 1}, "min_nodes": 1, "max_nodes": 1}],
    "cloud": "aws",
    "idle_termination_minutes": 0,
}
LOOK_S = 0.05
OURS = ("RAY_", "RUNTIME_ENV_", "HELIOSTAT_", "AUTOSCALER_")
"""Variables that our agent sets for Ray."""


class ByHand:
    """A head and one worker of EC2, started as a person would who wastes no moment."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._token = lab, secrets.token_hex(32)
        self._ec2 = lab.aws.account.client("ec2")

    def start(self) -> float:
        """Seconds until both are alive."""
        began = time.monotonic()
        head = self._launch({"role": "head", "group": "head", "groups": [{"max_nodes": 1}]}, "")
        ip = str(head["PrivateIpAddress"])
        self._launch({"role": "worker", "group": "w", "resources": {"CPU": 1}}, f"{ip}:6379")
        until("both to be alive", lambda: self._alive(ip) == 2, 240, LOOK_S)
        return time.monotonic() - began

    def end(self) -> None:
        self._ec2.terminate_instances(InstanceIds=self._lab.aws.living())
        until("both to be gone", lambda: not self._lab.hosts())

    def _launch(self, config: dict[str, Any], head: str) -> dict[str, Any]:
        cloud = self._lab.aws.account.config
        given = {"ImageId": cloud.image, "InstanceType": "m6i.large", "SubnetId": cloud.subnets[0].id}
        answer = self._ec2.run_instances(**given, MinCount=1, MaxCount=1, UserData=self._user_data(config, head))
        return dict(answer["Instances"][0])

    def _user_data(self, config: dict[str, Any], head: str) -> str:
        folder = Path("/var/lib/by-hand")
        boot = Boot("", "by-hand", 1, "", "IP", Ports.of(None), folder, Constants())
        variables = environment(boot, config["group"], head, autoscaling=False)
        command = shlex.join(arguments(boot, config, head, None)).replace("=IP", "=$IP")
        lines = ["#!/bin/bash", f"mkdir -p {boot.ray_dir}", "IP=$(hostname -I | cut -d' ' -f1)"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in variables.items() if name.startswith(OURS)]
        lines += [f"echo -n {self._token} >{token_path(boot)}", f"chmod 600 {token_path(boot)}"]
        if head:
            host, _, port = head.partition(":")
            lines.append(f"until (exec 3<>/dev/tcp/{host}/{port}) 2>/dev/null; do sleep 0.02; done")
        return "\n".join([*lines, f"exec {command}"]) + "\n"

    def _alive(self, ip: str) -> int:
        headers = {"authorization": f"Bearer {self._token}"}
        try:
            answer = httpx.get(f"http://{ip}:8265/api/v0/nodes", headers=headers, timeout=5)
        except httpx.TransportError:
            return 0
        if not answer.is_success:
            return 0
        return sum(node["state"] == "ALIVE" for node in answer.json()["data"]["result"]["result"])


def ours(site: Site, name: str) -> float:
    began = time.monotonic()
    answer = site.call("POST", "/v1/clusters", {"name": name, "compute_config": CONFIG})
    assert answer.is_success, answer.text
    path = f"/v1/clusters/{answer.json()['id']}"
    until("RUNNING", lambda: site.stack.get(path)["state"] == "RUNNING", 240, LOOK_S)
    took = time.monotonic() - began
    site.call("POST", f"{path}/terminate", {})
    until("TERMINATED", lambda: site.stack.get(path)["state"] == "TERMINATED", 60)
    until("both to be gone", lambda: not site.lab.hosts())
    return took


def spot(site: Site, scenarios: OnACloud) -> None:
    """Prints its figure."""
    scenarios.site, scenarios.lab, scenarios.stack = site, site.lab, site.stack
    with tempfile.TemporaryDirectory() as code:
        scenarios.test_a_spot_worker_is_taken_back_under_a_job(Path(code))


def main(pairs: int) -> None:
    lab = Lab()
    stack = Stack(ROOM / "home", Site.settings(lab))
    found: list[tuple[float, float]] = []
    try:
        stack.up()
        site = Site(lab, stack)
        site.register_aws("aws")
        site.register_gcp("gcp")
        for scenarios in (TestAws(), TestGcp()):
            spot(site, scenarios)
        by_hand = ByHand(lab)
        for number in range(pairs + 1):
            theirs = by_hand.start()
            by_hand.end()
            mine = ours(site, f"cost-{number}")
            print(f"pair {number}: by hand {theirs:.2f} s, ours {mine:.2f} s", flush=True)
            if number:  # the first fills the disk cache
                found.append((theirs, mine))
    finally:
        stack.dispose()
        lab.close()
    added = [mine - theirs for theirs, mine in found]
    hands, mines = [t for t, _ in found], [m for _, m in found]
    print(
        f"median of {pairs}: by hand {statistics.median(hands):.2f} s, ours {statistics.median(mines):.2f} s, "
        f"added {statistics.median(added):+.2f} s ({100 * statistics.median(added) / statistics.median(mines):+.0f} %)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4)
