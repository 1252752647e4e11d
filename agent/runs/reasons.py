"""The reason of a failed run in one line. Ray's message holds the end of the run's log, or a traceback of Ray's own.
The whole message is in the run's log and does not belong in a workflow's history."""

from __future__ import annotations

import re
import signal

MAX_CHARS = 500

_EXIT = re.compile(r"Job entrypoint command failed with exit code (-?\d+)(.*)", re.DOTALL)
_OF_RAY = re.compile(r"Running entrypoint for job |.*\bINFO job_manager\.py:\d+ -- ")
_ENTRYPOINT_MISSING = 127
_NOT_EXECUTABLE = 126
_BY_SHELL = (134, 137, 139, 143)
"""Exit codes of a shell whose program was aborted, killed, crashed or terminated by a signal."""


def summarize(message: str) -> str:
    """One line, at most ``MAX_CHARS`` characters."""
    found = _EXIT.match(message.strip())
    if found:
        text = _exit(int(found[1]), found[2])
    elif "runtime_env setup failed" in message or "runtime environment" in message:
        text = f"the runtime environment could not be created: {_runtime_env(message)}"
    else:
        text = _last(message.splitlines())
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 1] + "…"


def _exit(code: int, rest: str) -> str:
    lines = [line for line in rest.partition("\n")[2].splitlines() if not _OF_RAY.match(line)]
    if code == _ENTRYPOINT_MISSING:
        reason = next((line for line in reversed(lines) if "not found" in line), "")
        return "the entry point was not found (exit code 127)" + (f": {reason.strip()}" if reason else "")
    if code == _NOT_EXECUTABLE:
        return f"the entry point can't be executed (exit code 126): {_last(lines)}".rstrip(": ")
    if code < 0 or code in _BY_SHELL:
        number = -code if code < 0 else code - 128
        try:
            name = signal.Signals(number).name
        except ValueError:
            return f"exit code {code}"
        return f"killed by {name} (exit code {code})"
    last = _last(lines)
    return f"exit code {code}" + (f": {last}" if last else "")


def _runtime_env(message: str) -> str:
    """pip's own errors, if any, else the last line of the traceback."""
    errors = [m[1].strip() for m in re.finditer(r"^\s*ERROR: (.+)$", message, re.MULTILINE)]
    if errors:
        return "; ".join(dict.fromkeys(errors))
    missing = re.search(r"No module named (\w+)\s*$", message)
    if missing:
        return f"the node's Python has no module {missing[1]}"
    # An exception's line starts at the margin; its details (a command's output) are indented below it.
    return _last([line for line in message.splitlines() if line and not line[0].isspace()])


def _last(lines: list[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
