"""Ray on this machine: its command line, its environment, its start and its end."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from agent import processes
from agent.boot import Boot
from agent.gate_install import gate_environment, install_gate
from agent.init import die_with_parent
from agent.journal import write_private

log = logging.getLogger("agent.ray_node.process")

PASSED_ON = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "SSL_CERT_FILE",
             "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HELIOSTAT_MACHINE_ID")  # fmt: skip
PASSED_ON_PREFIXES = ("PIP_", "UV_", "NVIDIA_", "CUDA_")
"""What users' programs and Ray's pip need of the machine's environment. Nothing else passes: on the local cloud the
environment of the agent may hold the control plane's own secrets."""
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


class RayFailed(Exception):
    """Ray can't run on this node; says why and what to do."""


def installed_version() -> str:
    """As ``importlib.metadata`` says it, which takes 0.1 s to import: the file's name is enough."""
    for folder in sys.path:
        for found in Path(folder or ".").glob("ray-[0-9]*.dist-info"):
            return found.name.removeprefix("ray-").removesuffix(".dist-info")
    return ""


def check_version(boot: Boot) -> None:
    """Raises RayFailed: nodes of two versions form no cluster, and the control plane supports one."""
    found, required = installed_version(), boot.ray_version
    if required and found != required:
        has = f"has Ray {found}" if found else "has no Ray"
        raise RayFailed(
            f"this machine's Python ({sys.executable}) {has}; the control plane requires Ray {required}: change "
            "the cloud's container_image or python, or its machines' image"
        )


def environment(boot: Boot, group: str, head_address: str, autoscaling: bool, service: bool = False) -> dict[str, str]:
    """The whole environment of Ray and of all its processes. ``head_address``: "" on the head itself. ``service``:
    Serve's proxies get the gate."""
    env = {k: v for k, v in os.environ.items() if k in PASSED_ON or k.startswith(PASSED_ON_PREFIXES)}
    for name in PROXIES:
        for spelled in (name, name.upper()):
            if os.environ.get(spelled):
                env[spelled] = os.environ[spelled]
    if any(k.lower() in ("http_proxy", "https_proxy") for k in env):
        given = env.get("no_proxy") or env.get("NO_PROXY")
        hosts = [given, boot.ip, head_address.rpartition(":")[0], "127.0.0.0/8"]
        direct = ",".join(host for host in hosts if host)
        env["no_proxy"] = env["NO_PROXY"] = direct  # the head's packages and the dashboard are on this network
    bin_dir = str(Path(sys.executable).parent)
    env["PATH"] = ":".join([bin_dir, *[p for p in env.get("PATH", os.defpath).split(":") if p and p != bin_dir]])
    env.setdefault("HOME", str(boot.node_dir))
    env.setdefault("LANG", "C.UTF-8")
    env |= {
        "HELIOSTAT_NODE_ID": boot.node_id,
        "HELIOSTAT_NODE_DIR": str(boot.node_dir),  # marks all of this node's processes
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path(boot)),
        "RAY_CLOUD_INSTANCE_ID": boot.node_id,
        "RAY_NODE_TYPE_NAME": group,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(boot.constants.drain_s),
        # Ray detects a dead node in 3 s instead of 13 to 65: its connection breaks, so the checks fail at once. A node
        # that only does not answer (while it starts Serve, for example) has 20 s: at 2 s busy heads died.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "6000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_initial_delay_ms": "1000",
        # A machine that has lost its power closes no connection: its peers would wait for 300 s and 120 s more. Ray's
        # servers take a ping every 20 s (a call of 90 s was kept, 2.60).
        "RAY_grpc_client_keepalive_time_ms": "20000",
        "RAY_grpc_client_keepalive_timeout_ms": "10000",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else Ray writes into a program's log every second that it can't add nodes, while a group is at its maximum.
        "RAY_SCHEDULER_EVENTS": "0",
        # pip itself retries network errors; a requirement that does not exist would fail after three copies of the
        # whole environment instead of one.
        "RUNTIME_ENV_RETRY_TIMES": "1",
    } | boot.ports.environment()
    if autoscaling:
        env["RAY_enable_autoscaler_v2"] = "1"
        env["AUTOSCALER_UPDATE_INTERVAL_S"] = str(boot.constants.autoscaler_interval_s)
    if service:
        env |= gate_environment(boot)
    if autoscaling or service:
        env["PYTHONPATH"] = str(boot.provider_dir)
    return env


def token_path(boot: Boot) -> Path:
    return boot.node_dir / "ray-token"


def ray_executable() -> str:
    """Beside the agent's interpreter, else on the PATH. Raises RayFailed."""
    beside = Path(sys.executable).parent / "ray"
    found = str(beside) if beside.exists() else shutil.which("ray")
    if not found:
        raise RayFailed(
            f"there is no `ray` beside {sys.executable} nor on the PATH; install ray[default] in the node's image "
            "or name its interpreter in HELIOSTAT_PYTHON"
        )
    return found


def arguments(boot: Boot, config: dict[str, Any], head_address: str, autoscaling_config: Path | None) -> list[str]:
    """``ray start`` for this node. It holds no secret, for everybody on the machine can read it."""
    head = config["role"] == "head"
    resources = dict(config.get("resources") or {})
    args = [ray_executable(), "start", "--block", "--disable-usage-stats"]
    args += [f"--node-ip-address={boot.ip}", f"--node-name={boot.node_id}", f"--temp-dir={boot.temp_dir}"]
    if head:
        args += ["--head", f"--port={boot.ports.gcs}", f"--dashboard-host={boot.ip}"]
        args += [f"--dashboard-port={boot.ports.dashboard}"]
        if any(int(g.get("max_nodes") or 0) > 0 for g in config.get("groups") or []):
            resources["CPU"] = 0  # with worker groups the head runs no user work
            resources.pop("GPU", None)
            args.append("--num-gpus=0")
        if autoscaling_config is not None:
            args.append(f"--autoscaling-config={autoscaling_config}")
    else:
        args.append(f"--address={head_address}")
    args += boot.ports.options(head)
    for key, option in (("CPU", "num-cpus"), ("GPU", "num-gpus"), ("memory", "memory")):
        value = resources.pop(key, None)
        if value is not None:
            args.append(f"--{option}={int(value)}")
    store = resources.pop("object_store_memory", None)
    if store is None and boot.local:
        store = boot.constants.local_object_store_bytes
    if store is not None:
        args.append(f"--object-store-memory={int(store)}")
    if resources:
        args.append(f"--resources={json.dumps(resources, sort_keys=True)}")
    labels = config.get("labels") or {}
    if labels:
        args.append("--labels=" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())))
    return args


def accepts(address: str, timeout_s: float = 1.0) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout_s):
            return True
    except OSError:
        return False


class RayNode:
    """One ``ray start --block`` and all processes below it. Start it from the main thread: it dies with the thread that
    started it (``die_with_parent``)."""

    def __init__(self, boot: Boot, config: dict[str, Any]) -> None:
        self._boot = boot
        self._config = config
        self._leader: subprocess.Popen[bytes] | None = None
        self._raylet: int | None = None
        self._checked_at = 0.0
        self._head_address = ""
        self._output: Path | None = None

    def start(self, output: Path, head_address: str = "", autoscaling_config: Path | None = None) -> None:
        """Returns at once. Raises RayFailed."""
        boot = self._boot
        self._head_address, self._output = head_address, output
        write_private(token_path(boot), self._config["ray_token"])
        args = arguments(boot, self._config, head_address, autoscaling_config)
        service = bool(self._config.get("service_id"))
        if service:
            install_gate(boot)
        env = environment(boot, self._config["group"], head_address, autoscaling_config is not None, service)
        log.info("starting %s", " ".join(args))
        with output.open("ab") as out:
            self._leader = subprocess.Popen(
                args, env=env, cwd=boot.node_dir, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True, preexec_fn=die_with_parent,
            )  # fmt: skip

    @property
    def logs_dir(self) -> Path:
        return self._boot.ray_dir / "session_latest" / "logs"

    @property
    def up(self) -> bool:
        """Its raylet runs (as of the last ``ended``)."""
        return self._raylet is not None

    def ended(self) -> str:
        """Why Ray on this node is no longer up; "" while it is (or has not been started)."""
        if self._leader is None:
            return ""
        code = self._leader.poll()
        if code is not None:
            return f"`ray start` ended with exit code {code}; see node/agent.log of this node"
        # `ray start --block` stays when its raylet ends with exit code 0, as a drained one does.
        if time.monotonic() - self._checked_at >= 1.0:
            self._checked_at = time.monotonic()
            if self._raylet is None:
                self._raylet = processes.named_child(self._leader.pid, "raylet")
            elif not processes.alive(self._raylet):
                return DRAINED
        return ""

    def explain(self, ended: str) -> str:
        """``ended`` with Ray's own words, as far as it printed any."""
        try:
            tail = self._output.read_bytes()[-6000:] if self._output else b""
        except OSError:
            return ended
        lines = tail.decode(errors="replace").splitlines()
        errors = [line.strip() for line in lines if "Error" in line or "exited unexpectedly" in line]
        return f"{ended}: {errors[-1][:400]}" if errors else ended

    def drain(self, reason: str, left_s: int | None) -> str:
        """Has Ray drain this node, which ends in ``left_s`` seconds (None: unknown): it gets no new work, its current
        work goes on, and once it is idle its raylet ends. Returns why Ray did not, or "". Takes seconds."""
        found = re.search(r"--node_id=([0-9a-f]+)", processes.command(self._raylet)) if self._raylet else None
        if found is None:
            return "its raylet does not run"
        args = [ray_executable(), "drain-node", f"--address={self._head_address}", f"--node-id={found[1]}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={reason}"]  # fmt: skip
        if left_s is not None:
            args.append(f"--deadline-remaining-seconds={left_s}")
        env = environment(self._boot, self._config["group"], self._head_address, False)
        try:
            done = subprocess.run(
                args, env=env, cwd=self._boot.node_dir, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=self._boot.constants.drain_command_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "`ray drain-node` took too long"
        output = done.stdout.decode(errors="replace").strip().splitlines()
        return "" if done.returncode == 0 else output[-1][:300] if output else f"exit code {done.returncode}"

    def stop(self, timeout_s: float) -> None:
        """SIGTERM to the leader alone (to the whole group it breaks Ray's drain), then SIGKILL to what is left."""
        leader = self._leader
        if leader is None:
            return
        if leader.poll() is None and timeout_s > 0:
            leader.send_signal(signal.SIGTERM)
            try:
                leader.wait(timeout_s)
            except subprocess.TimeoutExpired:
                log.warning("Ray did not end within %.0f s of SIGTERM; killing it", timeout_s)
        left = processes.kill_tree(leader.pid, self._boot.mark)
        if leader.poll() is None:
            leader.kill()
            leader.wait()
        if left:
            log.error("processes of this node's Ray survive SIGKILL: %s", left)
        self._leader = None


DRAINED = "Ray's raylet on this node has ended: drained, or its head is gone"
