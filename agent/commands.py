"""Gets commands by long poll and executes each once."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from agent.channel import Backoff, Channel, Gone, Refused, Unavailable
from agent.constants import Constants
from agent.journal import Journal
from agent.packages import PackageFailed

log = logging.getLogger("agent.commands")
WAIT_S = 25
WAIT_WORKING_S = 2
KEPT = 500
"""Results kept for commands that come again."""

Handler = Callable[[dict[str, Any]], dict[str, Any]]


class CommandRefused(Exception):
    """The head can't carry out a command. ``retryable``: it has not begun and may come again."""

    def __init__(self, message: str, retryable: bool = False) -> None:
        self.retryable = retryable
        super().__init__(message)


class Commands:
    """``handlers``: by command kind. A handler may raise CommandRefused or PackageFailed."""

    def __init__(
        self, channel: Channel, journal: Journal, handlers: dict[str, Handler], constants: Constants,
        on_gone: Callable[[Exception], None],
    ) -> None:  # fmt: skip
        self._channel = channel
        self._journal = journal
        self._handlers = handlers
        self._constants = constants
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._working: set[str] = set()
        self._results: dict[str, dict[str, Any]] = {r["command"]: r["result"] for r in journal.records}
        if len(self._results) > KEPT:
            self._results = dict(list(self._results.items())[-KEPT:])
            journal.rewrite([{"command": i, "result": r} for i, r in self._results.items()])

    def run(self, stop: threading.Event) -> None:
        """Until ``stop``."""
        backoff = Backoff(self._constants.backoff_base_s, self._constants.backoff_cap_s)
        while not stop.is_set():
            began = time.monotonic()
            try:
                with self._lock:
                    known = ",".join(sorted(self._working))  # commands under way are not new
                # A command that ends during the wait still counts as known, and the same id, sent again, would wait
                # too.
                wait = WAIT_WORKING_S if known else WAIT_S
                answer = self._channel.call("GET", f"/commands?wait={wait}&known={quote(known)}", timeout_s=wait + 15)
            except Unavailable as error:
                log.debug("%s", error)
                stop.wait(backoff.next())
                continue
            except Refused as error:
                log.warning("commands are unavailable: %s", error)
                stop.wait(backoff.next())
                continue
            except Gone as error:
                self._on_gone(error)
                return
            backoff.reset()
            new = [c for c in answer["commands"] if self._start(c["id"])]
            for command in new:
                threading.Thread(target=self._process, args=(command, stop), name="command", daemon=True).start()
            if not new and time.monotonic() - began < 1.0:
                stop.wait(0.25)  # an API without `known` must not make this a busy loop

    def _start(self, command_id: str) -> bool:
        with self._lock:
            if command_id in self._working:
                return False
            self._working.add(command_id)
            return True

    def _process(self, command: dict[str, Any], stop: threading.Event) -> None:
        command_id = command["id"]
        try:
            result = self._results.get(command_id)
            if result is None:
                result = self.execute(command)
                if not result["retryable"]:
                    self._journal.append({"command": command_id, "result": result})
                    self._results[command_id] = result
            else:
                log.info("command %s repeated; its result comes from the journal", command_id)
            self._send_result(command_id, result, stop)
        except OSError as error:
            log.error("command %s: its result is not on disk: %s", command_id, error)
        finally:
            with self._lock:
                self._working.discard(command_id)

    def execute(self, command: dict[str, Any]) -> dict[str, Any]:
        """A CommandResult. Arguments hold secrets: none is logged."""
        kind, began = command["kind"], time.monotonic()
        handler = self._handlers.get(kind)
        try:
            if handler is None:
                raise CommandRefused(
                    f"this agent does not support the command {kind!r}; terminate the node to get a newer agent"
                )
            done = {"ok": True, "result": handler(command.get("args") or {}), "error": "", "retryable": False}
        except (CommandRefused, PackageFailed) as error:
            done = {"ok": False, "result": {}, "error": str(error), "retryable": error.retryable}
        except OSError as error:
            done = {"ok": False, "result": {}, "error": f"{kind}: {error.strerror or error}", "retryable": True}
        except Exception as error:  # noqa: BLE001 - the command must be answered, and its text may hold a secret
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.name}, line {frame.lineno}"
            log.error("command %s (%s) failed: %s in %s", command["id"], kind, type(error).__name__, where)
            done = {"ok": False, "result": {}, "error": f"{kind}: {type(error).__name__} in the agent; "
                    "see node/agent.log", "retryable": False}  # fmt: skip
        took = time.monotonic() - began
        log.info("command %s %s: ok=%s in %.2f s %s", command["id"], kind, done["ok"], took, done["error"])
        return done

    def _send_result(self, command_id: str, result: dict[str, Any], stop: threading.Event) -> None:
        backoff = Backoff(self._constants.backoff_base_s, self._constants.backoff_cap_s)
        while not stop.is_set():
            try:
                self._channel.call("POST", f"/commands/{command_id}/result", result)
            except Unavailable:
                stop.wait(backoff.next())
            except Refused as error:
                if error.status == 401:  # the reporter gets another token meanwhile
                    stop.wait(backoff.next())
                    continue
                log.error("the API refuses the result of command %s: %s", command_id, error)
                return
            except Gone as error:
                self._on_gone(error)
                return
            else:
                return
