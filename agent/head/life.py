"""What only a head does: Ray's head and its autoscaler, its workers, runs, activity, commands."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.commands import Commands
from agent.head.activity import Activity
from agent.head.members import Members
from agent.head.server import Server
from agent.journal import Journal, write_private
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayAway
from agent.ray_node.autoscaler import PROVIDER_MODULE, Scaling, autoscaling_config, write_config
from agent.ray_node.process import RayFailed, RayNode
from agent.runs.runner import Runs
from agent.serve.service import Serve

if TYPE_CHECKING:
    from agent.node.life import Node

log = logging.getLogger("agent.head.life")


def _gently() -> None:
    """A second of CPU, which Ray, starting beside it, needs more. A little only: the head waits for it in the end."""
    os.nice(5)


class Unjudged(RayFailed):
    """Ray's reader did not say in time whether the config is good."""


class Head:
    def __init__(self, node: Node, ray: RayNode) -> None:
        boot, config = node.boot, node.config
        self._node, self._ray, self._boot = node, ray, boot
        self.groups: list[dict[str, Any]] = config.get("groups") or []
        self.gcs_address = f"{boot.ip}:{boot.ports.gcs}"
        scales = any(int(g.get("max_nodes") or 0) > 0 for g in self.groups)
        self.scaling = Scaling(boot, node.facts, self.groups, config.get("desired") or {}) if scales else None
        self.packages = Packages(boot)
        self.api = RayApi(f"{boot.ip}:{boot.ports.dashboard}", config["ray_token"])
        self.runs = Runs(
            self.api, node.facts, node.logs, self.packages, Journal(boot.node_dir / "runs.journal"), boot.constants,
            ray.logs_dir, boot.mark,
        )  # fmt: skip
        self.activity = Activity(self.api, node.facts, boot.constants, self.runs.busy)
        self.members = Members(self.api, node.facts, self.scaling, boot.constants)
        service_id = str(config.get("service_id") or "")
        self.serve = Serve(boot, service_id, self.api, node.facts, self.packages) if service_id else None
        self.commands = Commands(
            node.channel, Journal(boot.node_dir / "commands.journal"),
            {"submit_run": self.runs.submit, "stop_run": lambda args: self.runs.stop(str(args["run_id"])),
             "fence": self._fence, "unfence": self._unfence,
             **(self.serve.handlers() if self.serve else {})},
            boot.constants, node.gone,
        )  # fmt: skip
        self._poke_activity = threading.Event()
        self.runs.began = self._poke_activity.set
        self._refused: list[dict[str, Any]] | None = None
        self._setting_bounds = False
        self._spare: dict[str, int] = {}
        """By how many Ray's maximum of a group is raised (``Scaling.spare``)."""
        self._config_file = boot.node_dir / "autoscaling.yaml"
        self._provider_dir = boot.provider_dir

    def start(self) -> None:
        """Returns when Ray is up. Raises RayFailed or End."""
        token = secrets.token_hex(32)
        write_private(self._boot.node_dir / "provider-token", token)
        self.server = Server(
            self._boot.ip, self._boot.ports.agent, token, self.packages, self.scaling, self.members.look_before_an_end
        )
        check: subprocess.Popen[bytes] | None = None
        if self.scaling:
            self._provider_dir.mkdir(exist_ok=True)
            source = Path(__file__).parents[1] / "ray_node" / "node_provider.py"
            shutil.copyfile(source, self._provider_dir / f"{PROVIDER_MODULE}.py")
            write_config(self._config_file, self._autoscaling(self.groups))
            check = self._validator(self._config_file)
        self._ray.start(self._node.log_file, autoscaling_config=self._config_file if self.scaling else None)
        version = self._ready()
        if check is not None:
            # It runs beside Ray's own start and takes less time; a head with a bad config never counts as ready.
            self._judge(check)
        self._node.ray_up = True
        self._node.facts.add("ray_ready", gcs_address=self.gcs_address, ray_version=version)
        for name, target, args in (
            ("members", self.members.run, (self._node.stop,)),
            ("activity", self.activity.run, (self._node.stop, self._poke_activity)),
            ("runs", self.runs.watch, (self._node.stop,)),
            ("commands", self.commands.run, (self._node.stop,)),
        ):
            self._node.thread(name, target, *args)
        if self.serve:
            self._node.thread("serve", self.serve.watch, self._node.stop)
            self._node.thread("traffic", self.serve.traffic.run, self._node.stop)

    def _ready(self) -> str:
        """Polls until Ray's API answers."""
        constants = self._boot.constants
        deadline = time.monotonic() + constants.head_ready_timeout_s
        address = f"{self._boot.ip}:{self._boot.ports.dashboard}"
        while True:
            try:
                return self.api.version()
            except RayAway as error:
                why = str(error)
            ended = self._ray.ended()
            if ended:
                raise RayFailed(self._node.why(ended))
            if time.monotonic() > deadline:
                raise RayFailed(
                    f"Ray's API at {address} was not up within {constants.head_ready_timeout_s:.0f} s: {why}"
                )
            self._node.pause(constants.ready_poll_s)

    def _autoscaling(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        shown = [{**g, "max_nodes": int(g.get("max_nodes") or 0) + self._spare.get(g["name"], 0)} for g in groups]
        return autoscaling_config(self._boot, self._node.config["cluster_name"], shown, self.server.address)

    def _validator(self, config: Path) -> subprocess.Popen[bytes]:
        env = {k: os.environ[k] for k in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH") if k in os.environ}
        env |= {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(
            [sys.executable, "-m", "agent.ray_node.validate_config", str(config), str(self._provider_dir)],
            env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=_gently,
        )  # fmt: skip

    def _judge(self, check: subprocess.Popen[bytes]) -> None:
        """Raises RayFailed with Ray's reason when the config is bad, Unjudged when that is not known."""
        try:
            _, errors = check.communicate(timeout=self._boot.constants.validate_timeout_s)
        except subprocess.TimeoutExpired:
            check.kill()
            check.communicate()
            raise Unjudged("the autoscaling config could not be checked: Ray's reader took too long") from None
        if check.returncode != 0:
            reason = (errors.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
            raise RayFailed(f"the worker groups give an autoscaling config that Ray refuses: {reason[:500]}")

    # -- commands -----------------------------------------------------------------------------------------------

    def _fence(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.runs.fence(True)
        state, reason = self.activity.look()
        return {"activity": state, "reason": reason}

    def _unfence(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.runs.fence(False)
        return {}

    # -- reports ------------------------------------------------------------------------------------------------

    def heard(self, answer: dict[str, Any]) -> None:
        """A report's answer. At once: the check of new bounds takes seconds, and a report that waits is silence."""
        if self.scaling is None or answer.get("nodes") is None:
            return
        spare = self.scaling.spare(answer["nodes"])
        if spare != self._spare and self._node.ray_up and not self._setting_bounds:
            before, self._spare = self._spare, spare
            try:
                write_config(self._config_file, self._autoscaling(self.groups))
            except OSError as error:
                self._spare = before
                log.warning("Ray's maxima wait for the next report: %s", error)
        self.scaling.update(answer["nodes"], answer.get("desired"))
        groups = answer.get("groups")
        if groups is None or groups == self.groups or groups == self._refused:
            return
        if self._node.ray_up and not self._setting_bounds:  # else the next answer has them still
            self._setting_bounds = True
            self._node.thread("bounds", self._set_bounds, self.scaling, groups)

    def _set_bounds(self, scaling: Scaling, groups: list[dict[str, Any]]) -> None:
        """The autoscaler reads its config again each second; a bad one never gets there, for it would end the head."""
        trial = self._config_file.with_name("autoscaling-trial.yaml")
        try:
            write_config(trial, self._autoscaling(groups))
            self._judge(self._validator(trial))
            trial.replace(self._config_file)
        except (Unjudged, OSError) as error:
            log.warning("the new bounds of the worker groups wait for the next report: %s", error)
        except (RayFailed, LookupError, TypeError, ValueError) as error:
            self._refused = groups
            log.warning("new bounds of the worker groups are not taken, the old ones hold: %s", error)
        else:
            scaling.set_groups(groups)
            self.groups, self._refused = groups, None
            log.info("the worker groups have new bounds: %s", groups)
        finally:
            self._setting_bounds = False

    def snapshot(self) -> dict[str, Any]:
        serve = {"serve": self.serve.traffic.last} if self.serve and self.serve.traffic.last else {}
        return serve | {"gcs_address": self.gcs_address, "workers_alive": self.members.workers_alive,
                "resources": self.members.resources, **self.activity.snapshot()}  # fmt: skip
