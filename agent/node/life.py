"""A node's life: register, start Ray, run until somebody or something ends it, end everything."""

from __future__ import annotations

import logging
import signal
import time
from typing import TYPE_CHECKING, Any

from agent.boot import Boot
from agent.channel import Gone, Refused, Unavailable
from agent.context import Context, Shutdown
from agent.node.deadman import DeadMan
from agent.node.interruptions import InterruptionWatcher, Notice
from agent.node.registration import head_address, register, register_again
from agent.node.reporter import Reporter
from agent.ray_node.process import DRAINED, RayFailed, RayNode, check_version

if TYPE_CHECKING:
    from agent.head.life import Head

log = logging.getLogger("agent.node.life")
SIGNALLED = "ended by a signal"


class Node:
    def __init__(self, boot: Boot) -> None:
        self._boot = boot
        self._context = Context(boot)
        self._config: dict[str, Any] = {}
        self._head: Head | None = None
        self._ray: RayNode | None = None
        self._reporter: Reporter | None = None
        self._interruptions: InterruptionWatcher | None = None
        if boot.provider:
            self._interruptions = InterruptionWatcher(boot.provider, boot.constants, self._on_notice)

    def run(self) -> int:
        """Returns the exit code: 1 when the node failed, else 0."""
        context = self._context
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: context.shut_down_by_signal(SIGNALLED))
        try:
            self._config = register(context)
            self._ray = ray = RayNode(self._boot, self._config)
            self._deadman = DeadMan(float(self._config["deadman_s"]))
            self._deadman.maximum_uptime_at = self._config.get("maximum_uptime_at")
            if self._is_head:
                from agent.head.life import Head  # a third of all imports, and workers need none of it

                self._head = Head(context, self._config, ray)
            self._start_reports(ray)
            check_version(self._boot)
            if self._interruptions:
                for source in self._interruptions.sources:
                    context.start_thread("interruptions", self._interruptions.watch, source, context.stop)
            if self._head:
                self._head.start()
            else:
                ray.start(context.log_file, head_address=head_address(context))
            self._watch(ray)
        except Shutdown as shutdown:
            context.shut_down(shutdown)
        except RayFailed as error:
            context.shut_down(Shutdown(str(error), "node_failed"))
        except Exception as error:
            log.exception("the agent failed")
            reason = f"the agent failed: {type(error).__name__}; see node/agent.log"
            context.shut_down(Shutdown(reason, "node_failed"))
        return self._close(context.shutdown or Shutdown("ended"))

    @property
    def _is_head(self) -> bool:
        return self._config.get("role") == "head"

    def _start_reports(self, ray: RayNode) -> None:
        context = self._context
        self._reporter = Reporter(
            context, float(self._config.get("report_interval_s") or 2.0), self._snapshot, self._on_answer,
            lambda: register_again(context),
        )  # fmt: skip
        context.logs.add("node/agent.log", context.log_file)
        if self._boot.provider:
            context.logs.add("node/startup.log", self._boot.node_dir / "startup.log")
        context.logs.watch_session(lambda: ray.logs_dir)
        context.start_thread("report", self._reporter.run, context.stop)
        context.start_thread("logs", context.logs.run, context.stop)

    def _watch(self, ray: RayNode) -> None:
        """The main thread until the end: Ray's leader, the cloud's notices and the dead-man switch."""
        context = self._context
        drained_at = 0.0
        while True:
            context.sleep(0.25)
            ended = ray.ended()
            notice = self._interruptions.most_serious if self._interruptions else None
            if ended == DRAINED and not self._is_head:
                # Ray's autoscaler has drained this worker: the control plane ends it. Or its head is gone.
                drained_at = drained_at or time.monotonic()
                context.ray_up = False
                if time.monotonic() - drained_at >= self._boot.constants.idle_drain_grace_s:
                    raise Shutdown(notice.reason if notice else ended, "stopping")
            elif ended:
                raise Shutdown(ray.explain(ended), "node_failed")
            elif not self._is_head:
                context.ray_up = ray.up
                left = notice.left_s() if notice else None
                if notice and left is not None and left <= self._boot.constants.leave_before_s:
                    raise Shutdown(notice.reason, "stopping", report_last=True)
            activity = self._head.activity.state if self._head else ("busy" if context.ray_up else "idle")
            overdue = self._deadman.check(context.channel.last_contact, activity)
            if overdue:
                raise Shutdown(overdue, "stopping")

    def _on_notice(self, notice: Notice) -> None:
        """The control plane first, for it has a machine to launch; then Ray. A head is not drained: what runs there
        may go on until the cloud takes it."""
        self._context.events.add("spot_notice", kind=notice.kind, deadline=notice.deadline, reason=notice.reason)
        if self._is_head or self._ray is None or self._context.shutdown is not None:
            return
        try:
            refused = self._ray.drain(notice.reason, notice.left_s())
        except (RayFailed, OSError) as error:
            refused = str(error)
        if refused:
            log.warning("Ray does not drain this node: %s", refused)
        else:
            log.info("Ray drains this node")

    # -- reports --------------------------------------------------------------------------------------------------

    def _snapshot(self) -> dict[str, Any]:
        snapshot: dict[str, Any] = {
            "ray_up": self._context.ray_up, "log_bytes_pending": self._context.logs.pending()
        }  # fmt: skip
        return snapshot | self._head.snapshot() if self._head else snapshot

    def _on_answer(self, answer: dict[str, Any]) -> None:
        self._context.logs.set_follow(bool(answer.get("follow")))  # protocol 0 has none
        if "maximum_uptime_at" in answer:
            self._deadman.maximum_uptime_at = answer["maximum_uptime_at"]
        if self._head:
            self._head.on_answer(answer)

    # -- the end --------------------------------------------------------------------------------------------------

    def _close(self, shutdown: Shutdown) -> int:
        context, constants = self._context, self._boot.constants
        if shutdown.reason == SIGNALLED and self._interruptions and (notice := self._interruptions.poll()):
            # The system goes down and the cloud says why, so the cluster need not detect it by silence.
            shutdown = Shutdown(notice.reason, "node_lost" if self._is_head else "stopping")
        log.info("shutting down: %s", shutdown.reason)
        if shutdown.kind and not shutdown.report_last:
            self._report(shutdown)
        if self._ray is not None:
            self._ray.stop(constants.ray_stop_s if shutdown.graceful else 0)
        if shutdown.kind and shutdown.report_last:
            self._report(shutdown)
        context.stop.set()
        if context.channel.token and shutdown.graceful:
            context.logs.flush(constants.final_flush_s)
        # The machine ends with this process: on the local cloud init kills all below it, elsewhere the start-up script
        # that runs it goes on to `shutdown -h now`.
        return 1 if shutdown.kind == "node_failed" else 0

    def _report(self, shutdown: Shutdown) -> None:
        self._context.events.add(shutdown.kind, reason=shutdown.reason)
        if self._reporter is None or not self._context.channel.token:
            return
        try:
            self._reporter.report(timeout_s=3.0)
        except (Unavailable, Refused, Gone) as error:
            log.warning("the last report failed: %s", error)
