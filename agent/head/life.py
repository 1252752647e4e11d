"""What only a head does: Ray's head and its autoscaler, its workers, runs, activity, commands."""

from __future__ import annotations

import logging
import secrets
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from agent.commands import Commands
from agent.context import Context
from agent.head.activity import Activity
from agent.head.members import Members
from agent.head.server import Server
from agent.head.validation import ValidationIncomplete, start_validation, validation_result
from agent.journal import Journal, write_private
from agent.packages import Packages
from agent.ray_node.api import RayApi, RayUnavailable
from agent.ray_node.autoscaler import PROVIDER_MODULE, Scaling, autoscaling_config, write_config
from agent.ray_node.process import RayFailed, RayNode
from agent.runs.runner import Runs
from agent.serve.service import Serve

log = logging.getLogger("agent.head.life")


class Head:
    def __init__(self, context: Context, config: dict[str, Any], ray: RayNode) -> None:
        boot = context.boot
        self._context, self._ray, self._boot = context, ray, boot
        self._cluster_name: str = config["cluster_name"]
        self.groups: list[dict[str, Any]] = config.get("groups") or []
        self.gcs_address = f"{boot.ip}:{boot.ports.gcs}"
        scales = any(int(g.get("max_nodes") or 0) > 0 for g in self.groups)
        self.scaling = Scaling(boot, context.events, self.groups, config.get("desired") or {}) if scales else None
        self.packages = Packages(boot)
        self.api = RayApi(f"{boot.ip}:{boot.ports.dashboard}", config["ray_token"])
        self.runs = Runs(
            self.api, context.events, context.logs, self.packages, Journal(boot.node_dir / "runs.journal"),
            boot.constants, ray.logs_dir, boot.mark,
        )  # fmt: skip
        self.activity = Activity(self.api, context.events, boot.constants, self.runs.busy)
        self.members = Members(self.api, context.events, self.scaling, boot.constants)
        service_id = str(config.get("service_id") or "")
        self.serve = Serve(boot, service_id, self.api, context.events, self.packages) if service_id else None
        self.commands = Commands(
            context.channel, Journal(boot.node_dir / "commands.journal"),
            {"submit_run": self.runs.submit, "stop_run": lambda args: self.runs.stop(str(args["run_id"])),
             "fence": self._fence, "unfence": self._unfence,
             **(self.serve.handlers() if self.serve else {})},
            boot.constants, context.fail,
        )  # fmt: skip
        self._wake_activity = threading.Event()
        self.runs.on_started = self._wake_activity.set
        self._rejected_groups: list[dict[str, Any]] | None = None
        self._setting_bounds = False
        self._headroom: dict[str, int] = {}
        """By how much Ray's maximum of a group is raised (``Scaling.headroom``)."""
        self._config_file = boot.node_dir / "autoscaling.yaml"
        self._provider_dir = boot.provider_dir

    def start(self) -> None:
        """Returns when Ray is up. Raises RayFailed or Shutdown."""
        context = self._context
        token = secrets.token_hex(32)
        write_private(self._boot.node_dir / "provider-token", token)
        self.server = Server(
            self._boot.ip, self._boot.ports.agent, token, self.packages, self.scaling,
            self.members.refresh_before_terminate,
        )  # fmt: skip
        validation: subprocess.Popen[bytes] | None = None
        if self.scaling:
            self._provider_dir.mkdir(exist_ok=True)
            source = Path(__file__).parents[1] / "ray_node" / "node_provider.py"
            shutil.copyfile(source, self._provider_dir / f"{PROVIDER_MODULE}.py")
            write_config(self._config_file, self._autoscaling(self.groups))
            validation = start_validation(self._config_file, self._provider_dir)
        self._ray.start(context.log_file, autoscaling_config=self._config_file if self.scaling else None)
        version = self._wait_until_ready()
        if validation is not None:
            # It runs beside Ray's own start and takes less time; a head with a bad config never counts as ready.
            validation_result(validation, self._boot.constants.validate_timeout_s)
        context.ray_up = True
        context.events.add("ray_ready", gcs_address=self.gcs_address, ray_version=version)
        context.start_thread("members", self.members.run, context.stop)
        context.start_thread("activity", self.activity.run, context.stop, self._wake_activity)
        context.start_thread("runs", self.runs.watch, context.stop)
        context.start_thread("commands", self.commands.run, context.stop)
        if self.serve:
            context.start_thread("serve", self.serve.watch, context.stop)
            context.start_thread("traffic", self.serve.traffic.run, context.stop)

    def _wait_until_ready(self) -> str:
        """Polls until Ray's API answers. Returns Ray's version."""
        constants = self._boot.constants
        deadline = time.monotonic() + constants.head_ready_timeout_s
        address = f"{self._boot.ip}:{self._boot.ports.dashboard}"
        while True:
            try:
                return self.api.version()
            except RayUnavailable as error:
                reason = str(error)
            ended = self._ray.ended()
            if ended:
                raise RayFailed(self._ray.explain(ended))
            if time.monotonic() > deadline:
                raise RayFailed(
                    f"Ray's API at {address} was not up within {constants.head_ready_timeout_s:.0f} s: {reason}"
                )
            self._context.sleep(constants.ready_poll_s)

    def _autoscaling(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        raised = [{**g, "max_nodes": int(g.get("max_nodes") or 0) + self._headroom.get(g["name"], 0)} for g in groups]
        return autoscaling_config(self._boot, self._cluster_name, raised, self.server.address)

    # -- commands -----------------------------------------------------------------------------------------------

    def _fence(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.runs.fence(True)
        state, reason = self.activity.refresh()
        return {"activity": state, "reason": reason}

    def _unfence(self, _args: dict[str, Any]) -> dict[str, Any]:
        self.runs.fence(False)
        return {}

    # -- reports ------------------------------------------------------------------------------------------------

    def on_answer(self, answer: dict[str, Any]) -> None:
        """A report's answer. Returns at once: the validation of new bounds takes seconds, and without reports the head
        counts as silent."""
        if self.scaling is None or answer.get("nodes") is None:
            return
        headroom = self.scaling.headroom(answer["nodes"])
        if headroom != self._headroom and self._context.ray_up and not self._setting_bounds:
            before, self._headroom = self._headroom, headroom
            try:
                write_config(self._config_file, self._autoscaling(self.groups))
            except OSError as error:
                self._headroom = before
                log.warning("Ray's maxima can't be raised before the next report: %s", error)
        self.scaling.update(answer["nodes"], answer.get("desired"))
        groups = answer.get("groups")
        if groups is None or groups == self.groups or groups == self._rejected_groups:
            return
        if self._context.ray_up and not self._setting_bounds:  # else the next answer has them again
            self._setting_bounds = True
            self._context.start_thread("bounds", self._set_bounds, self.scaling, groups)

    def _set_bounds(self, scaling: Scaling, groups: list[dict[str, Any]]) -> None:
        """The autoscaler reads its config again each second. A bad one never gets there, for it would end the head."""
        trial = self._config_file.with_name("autoscaling-trial.yaml")
        try:
            write_config(trial, self._autoscaling(groups))
            validation_result(
                start_validation(trial, self._provider_dir), self._boot.constants.validate_timeout_s
            )  # fmt: skip
            trial.replace(self._config_file)
        except (ValidationIncomplete, OSError) as error:
            log.warning("the new bounds of the worker groups wait for the next report: %s", error)
        except (RayFailed, LookupError, TypeError, ValueError) as error:
            self._rejected_groups = groups
            log.warning("the new bounds of the worker groups are invalid, the old ones stay: %s", error)
        else:
            scaling.set_groups(groups)
            self.groups, self._rejected_groups = groups, None
            log.info("the worker groups have new bounds: %s", groups)
        finally:
            self._setting_bounds = False

    def snapshot(self) -> dict[str, Any]:
        serve = {"serve": self.serve.traffic.last} if self.serve and self.serve.traffic.last else {}
        return serve | {"gcs_address": self.gcs_address, "workers_alive": self.members.workers_alive,
                "resources": self.members.resources, **self.activity.snapshot()}  # fmt: skip
