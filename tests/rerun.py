"""Runs parts of a test run one after the other, each in a pytest of its own; a test that failed once more, alone:

    python -m tests.rerun PYTEST-ARGUMENTS [-- PYTEST-ARGUMENTS OF THE NEXT PART]…

A test that passes then is flaky: the last lines name it and the file with the output of its first failure, and the run
goes on. The run fails if a test fails again, or if more than two would have to be run again in all parts together:
that many are no accident, so none of them is. Whatever is not the failure of a test stays a failure, for nothing that
is run alone can disprove it: an error of collection, an interrupt, tests that were not run, a pytest that died.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

MOST = 2
TESTS_FAILED = 1  # pytest's exit code; pytest itself is loaded only where it runs
OUTPUTS = Path(".flaky")
RECORD = "--write-record"
ENDS_SHARED = "ends what is shared"


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Marks the last test of a module or class. With it the fixtures of many tests end, some of which assert that
    nothing is left: what fails there need not be this test's, nor fail when this test is run alone."""
    if nextitem is None or nextitem.parent is not item.parent:
        item.user_properties.append((ENDS_SHARED, True))


@dataclass
class Record:
    """What one pytest saw."""

    failures: dict[str, str] = field(default_factory=dict)  # by test: its output
    passed: list[str] = field(default_factory=list)
    beyond_rerun: list[str] = field(default_factory=list)  # what a test that is run alone cannot disprove


class Recorder:
    """A plugin of the pytest that reports: with xdist, not of its workers."""

    def __init__(self) -> None:
        self.record = Record()
        self.reported: set[str] = set()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.record.beyond_rerun.append(f"{report.nodeid} cannot be collected")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid
        self.reported.add(name)
        if report.failed:
            sections = [(f"failed: {report.when}", report.longreprtext), *report.sections]
            text = "".join(f"── {title}\n{content.rstrip()}\n\n" for title, content in sections)
            self.record.failures[name] = self.record.failures.get(name, "") + text
            if report.when == "teardown" and any(key == ENDS_SHARED for key, _ in report.user_properties):
                self.record.beyond_rerun.append(f"what failed after {name} may be a fixture shared with other tests")
        elif report.when == "call" and report.passed:
            self.record.passed.append(name)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if (missing := session.testscollected - len(self.reported)) > 0:
            self.record.beyond_rerun.append(f"tests that were not run at all: {missing}")


def run_and_record(file: Path, args: list[str]) -> int:
    """Written when all has ended well or badly, but ended: of a pytest that dies there is no record."""
    import pytest

    recorder = Recorder()
    code = pytest.main([*args, "-p", "tests.rerun"], plugins=[recorder])
    file.write_text(json.dumps(asdict(recorder.record)))
    return code


def run_pytest(args: list[str]) -> tuple[int, Record]:
    """In a process of its own: the exit code, and what was seen. Zero only if pytest came to its end."""
    with tempfile.TemporaryDirectory() as folder:
        file, interrupted = Path(folder) / "record.json", False
        child = subprocess.Popen([sys.executable, "-m", "tests.rerun", RECORD, str(file), *args])
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:  # pytest has it from the terminal too, and cleans up before it ends
                interrupted = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not file.exists():
            return code or 1, Record(beyond_rerun=[f"pytest died (exit code {code})"])
        return code or (2 if interrupted else 0), Record(**json.loads(file.read_text()))


def keep(name: str, args: list[str], output: str) -> Path:
    """The output of a test's latest failure that did not come again."""
    OUTPUTS.mkdir(exist_ok=True)
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", name)[:150].strip("-")
    file = OUTPUTS / f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.txt"
    head = f"{name}\nfailed before {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, passed when run again, alone\n"
    text = f"{head}of: pytest {' '.join(args)}\n\n{output}"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")
    return file


def run_part(args: list[str], flaky: dict[str, Path]) -> tuple[int, list[str]]:
    """The exit code, and why it is not zero where pytest's own lines do not tell. Adds to ``flaky``."""
    code, record = run_pytest(args)
    failures = record.failures
    if code != TESTS_FAILED or record.beyond_rerun or not failures:
        return code, [f"not run again: {reason}" for reason in record.beyond_rerun] if code else []
    if len(flaky) + len(failures) > MOST:
        return code, [f"not run again: {len(flaky) + len(failures)} tests in all parts together, more than {MOST}"]
    for name, output in failures.items():
        print(f"\nrun again, alone: {name}", flush=True)
        # Without the part's own arguments: those that choose tests would add some to the one that is named.
        again, seen = run_pytest([name, "-p", "no:xdist"])
        if again or seen.passed != [name]:
            # None that passes may come after it: the last lines of pytest itself are those of what failed.
            return again or code, [f"FAILED AGAIN {name}" if seen.failures else f"did not pass when run again: {name}"]
        flaky[name] = keep(name, args, output)
    return 0, []


def main(words: list[str]) -> int:
    if words[:1] == [RECORD]:
        return run_and_record(Path(words[1]), words[2:])
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            parts.append([])
        else:
            parts[-1].append(word)
    flaky: dict[str, Path] = {}
    code, reasons = 0, list[str]()
    for args in parts:
        code, reasons = run_part(args, flaky)
        if code:
            break
    if flaky or reasons:
        print(flush=True)  # a pytest that died has left its line open
    for name, file in flaky.items():
        print(f"FLAKY {name}\n  output of its first failure: {file}", flush=True)
    for reason in reasons:
        print(reason, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
