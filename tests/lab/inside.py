"""Tests that run in the lab: pytest outside starts one of its own inside, once for all of them, and takes over its
reports, so each is an ordinary test with its own result and time. Outside without root they are skipped, and say so.

``tests/e2e/conftest.py`` hands tests with the marker ``lab`` over; inside this module is a plugin of pytest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import namespaces

_ROOT = Path(__file__).resolve().parents[2]


# -- outside


class Inner:
    """The pytest in the lab, with all tests of this session that belong there."""

    def __init__(self, session: pytest.Session) -> None:
        self._left = ids = [item.nodeid for item in session.items if item.get_closest_marker("lab") is not None]
        shown, told = os.pipe()
        self._output = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - until the session ends
        options = ["-p", "tests.lab.inside", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-m", ""]
        verbatim = session.config.getoption("capture") == "no"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lab", sys.executable, "-m", "pytest", *options, *(["-s"] * verbatim), *ids],
            cwd=_ROOT, env=os.environ | {namespaces.REPORTS: str(told)}, pass_fds=[told], stdin=subprocess.DEVNULL,
            stdout=None if verbatim else self._output, stderr=None if verbatim else subprocess.STDOUT,
        )  # fmt: skip
        os.close(told)
        self._reports = os.fdopen(shown)

    def reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """Of that test, which is the next one inside."""
        for line in self._reports:
            told = json.loads(line)
            if "finished" in told:
                assert told["finished"] == item.nodeid, f"{told['finished']} ended, {item.nodeid} was awaited"
                self._left.remove(item.nodeid)
                return
            yield item.config.hook.pytest_report_from_serializable(config=item.config, data=told)
        code = self._process.wait()
        self._output.seek(0)
        text = f"the lab ended with exit code {code} before this test did:\n{self._output.read()[-8000:]}"
        yield pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")

    def close(self) -> None:
        """A lab that does not end well makes the run fail; one that nobody waits for any more (``-x``) is killed."""
        self._reports.close()
        if self._left:
            self._process.kill()
            self._process.wait()
            return
        code = self._process.wait(60)
        self._output.seek(0)
        assert code in (0, 1), f"the lab ended with exit code {code}:\n{self._output.read()[-8000:]}"


_inner = pytest.StashKey[Inner]()


def hand_over(item: pytest.Item) -> bool | None:
    """For ``pytest_runtest_protocol``: True when the test has run in the lab; None: let it run here."""
    if item.get_closest_marker("lab") is None or namespaces.inside() or namespaces.missing():
        return None
    session = item.session
    item.ihook.pytest_timeout_cancel_timer(item=item)  # it has one inside
    if _inner not in session.stash:
        session.stash[_inner] = Inner(session)
        session.config.add_cleanup(session.stash[_inner].close)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in session.stash[_inner].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


# -- inside


class Teller:
    """Tells the pytest outside."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._pipe = os.fdopen(int(os.environ[namespaces.REPORTS]), "w", buffering=1)

    def _tell(self, told: dict[str, Any]) -> None:
        self._pipe.write(json.dumps(told) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._tell(self._config.hook.pytest_report_to_serializable(config=self._config, report=report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell({"finished": nodeid})


def pytest_configure(config: pytest.Config) -> None:
    if namespaces.REPORTS in os.environ:
        config.pluginmanager.register(Teller(config))
