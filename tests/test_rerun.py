"""What `make test` makes of tests that fail: the real program, on suites of a few lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# `fails_first(name)` fails the first time only; `runs.txt` has a line for each test that began: its name, its process.
HELPERS = """
import os, pathlib, sys, pytest

@pytest.fixture(autouse=True)
def noted(request):
    with open("runs.txt", "a") as file:
        file.write(f"{os.getpid()} {request.node.name}\\n")

def first(name):
    seen = pathlib.Path(f"seen-{name}")
    is_first = not seen.exists()
    seen.touch()
    return is_first

def fails_first(name):
    print(f"printed by {name}")
    assert not first(name), f"{name} fails once"
"""
XDIST = ["-p", "xdist", "-n", "2", "--dist", "loadfile"]


@dataclass
class Suite:
    folder: Path

    def add(self, file: str, code: str) -> None:
        (self.folder / file).write_text(HELPERS + code)

    def start(self, *args: str) -> subprocess.Popen[str]:
        (self.folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        env |= {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        command = [sys.executable, "-m", "tests.rerun", *args]
        return subprocess.Popen(
            command, cwd=self.folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip

    def run(self, *args: str) -> tuple[int, list[str]]:
        process = self.start(*args)
        out, _ = process.communicate(timeout=60)
        print(out)
        return process.returncode, out.splitlines()

    @property
    def runs(self) -> list[tuple[str, str]]:
        """The process and the name of each test that began."""
        file = self.folder / "runs.txt"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(pid, name) for pid, name in (line.split(" ", 1) for line in lines)]

    @property
    def times(self) -> Counter[str]:
        return Counter(name for _, name in self.runs)


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return Suite(tmp_path)


def closing_line(lines: list[str]) -> str:
    """The last in which pytest counts."""
    return [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)][-1]


def test_nothing_is_run_again_when_nothing_fails(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): pass\ndef test_b(): pytest.skip('not here')")
    code, lines = suite.run()
    assert code == 0
    assert "1 passed, 1 skipped" in lines[-1]
    assert len(set(suite.runs)) == 2
    assert len({pid for pid, _ in suite.runs}) == 1
    assert not (suite.folder / ".flaky").exists()


@pytest.mark.parametrize("args", [[], XDIST], ids=["one process", "xdist"])
def test_a_test_that_passes_alone_is_named_flaky_and_its_output_kept(suite: Suite, args: list[str]) -> None:
    suite.add("test_a.py", "def test_a(): fails_first('a')\ndef test_b(): pass\ndef test_c(): pass")
    code, lines = suite.run("-k", "not test_c", *args)
    assert code == 0
    assert lines[-2] == "FLAKY test_a.py::test_a"
    file = lines[-1].removeprefix("  output of its first failure: ")
    assert file.startswith(".flaky/test-a.py-test-a-")
    kept = (suite.folder / file).read_text()
    assert "AssertionError: a fails once" in kept
    assert "printed by a" in kept
    assert "1 passed" in closing_line(lines)
    assert "failed" not in closing_line(lines)
    assert suite.times == {"test_a": 2, "test_b": 1}
    assert suite.runs[-1][1] == "test_a"  # after all others, in a process without another test
    assert [pid for pid, _ in suite.runs].count(suite.runs[-1][0]) == 1


def test_a_test_that_fails_again_fails_the_run_and_is_last(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): assert 1 == 2\ndef test_b(): fails_first('b')")
    suite.add("test_b.py", "def test_c(): pass")
    code, lines = suite.run("test_a.py", "--", "test_b.py")
    assert code == 1
    assert lines[-1] == "FAILED AGAIN test_a.py::test_a"
    assert "1 failed" in closing_line(lines)
    assert not [line for line in lines if line.startswith("FLAKY")]
    assert suite.times == {"test_a": 2, "test_b": 1}  # nor the next part, as ever


def test_three_that_fail_are_not_run_again(suite: Suite) -> None:
    suite.add("test_a.py", "@pytest.mark.parametrize('n', 'abc')\ndef test_a(n): fails_first(n)")
    code, lines = suite.run()
    assert code == 1
    assert lines[-1] == "not run again: 3 tests in all parts together, more than 2"
    assert "3 failed" in closing_line(lines)
    assert len(suite.runs) == 3


def test_flaky_tests_are_counted_over_all_parts_and_told_at_the_end(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): fails_first('a')")
    suite.add("test_b.py", "def test_b(): fails_first('b')")
    suite.add("test_c.py", "def test_c(): fails_first('c')")
    code, lines = suite.run("test_a.py", "--", "test_b.py")
    assert code == 0
    assert [lines[-4], lines[-2]] == ["FLAKY test_a.py::test_a", "FLAKY test_b.py::test_b"]

    for seen in suite.folder.glob("seen-*"):
        seen.unlink()
    code, lines = suite.run("test_a.py", "test_b.py", "--", "test_c.py")
    assert code == 1
    assert [lines[-5], lines[-3]] == ["FLAKY test_a.py::test_a", "FLAKY test_b.py::test_b"]
    assert lines[-1] == "not run again: 3 tests in all parts together, more than 2"
    assert suite.times["test_c"] == 1


def test_any_parameter_can_be_run_again(suite: Suite) -> None:
    values = ['a b  c::d[1]/it\'s "$HOME" `ls` *', "-é\n\\ü\x00\udcff;" + "z" * 400]
    suite.add(
        "test_a.py",
        "class TestIt:\n"
        f"    @pytest.mark.parametrize('value', {values!a}, ids=lambda v: v)\n"
        "    def test_it(self, value): fails_first(len(value))\n"
        "    def test_next(self): pass\n",
    )
    code, _ = suite.run()
    assert code == 0
    assert sorted(suite.times.values()) == [1, 2, 2]
    assert len(list((suite.folder / ".flaky").iterdir())) == 2


@pytest.mark.parametrize("args", [["--continue-on-collection-errors"], XDIST], ids=["goes on", "xdist"])
def test_what_cannot_be_collected_stays_a_failure(suite: Suite, args: list[str]) -> None:
    suite.add("test_a.py", "def test_a(): fails_first('a')")
    suite.add("test_b.py", "import no_such_module")
    code, lines = suite.run(*args)
    assert code != 0
    assert "not run again: test_b.py cannot be collected" in lines
    assert suite.times["test_a"] <= 1


@pytest.mark.parametrize(
    "code",
    ["raise KeyboardInterrupt", "pytest.exit('enough', returncode=1)", "os._exit(0)"],
)
def test_a_run_that_ends_early_stays_a_failure(suite: Suite, code: str) -> None:
    suite.add("test_a.py", f"def test_a(): fails_first('a')\ndef test_b(): {code}\ndef test_c(): pass")
    exit_code, _ = suite.run()
    assert exit_code != 0
    assert suite.times == {"test_a": 1, "test_b": 1}


def test_tests_that_were_not_run_stay_a_failure(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): fails_first('a')\ndef test_b(): pass")
    code, lines = suite.run("-x")
    assert code == 1
    assert lines[-1] == "not run again: tests that were not run at all: 1"


def test_an_interrupt_from_the_terminal_waits_for_what_pytest_cleans_up(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "import time\n"
        "@pytest.fixture\ndef slow():\n    yield\n    time.sleep(0.6)\n    pathlib.Path('cleaned').touch()\n"
        "def test_a(slow):\n    pathlib.Path('began').touch()\n    time.sleep(30)\n",
    )
    process = suite.start()
    deadline = time.monotonic() + 30
    while not (suite.folder / "began").exists():
        assert time.monotonic() < deadline, "the test has not begun after 30 s"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 2
    assert (suite.folder / "cleaned").exists()


def test_a_test_that_kills_its_worker_once_is_flaky(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a():\n    if first('a'): os._exit(1)\ndef test_b(): pass")
    code, lines = suite.run(*XDIST)
    assert code == 0
    assert lines[-2] == "FLAKY test_a.py::test_a"
    assert "crashed while running" in next((suite.folder / ".flaky").iterdir()).read_text()


def test_a_test_that_kills_each_worker_fails_the_run(suite: Suite) -> None:
    suite.add("test_a.py", "def test_a(): os._exit(1)\ndef test_b(): pass")
    code, lines = suite.run(*XDIST, "--max-worker-restart", "1")
    assert code == 1
    assert "not run again: tests that were not run at all: 1" in lines


@pytest.mark.parametrize("again", ["os._exit(0)", "pytest.skip('not here')"])
def test_only_a_pass_is_a_pass_the_second_time(suite: Suite, again: str) -> None:
    suite.add("test_a.py", f"def test_a():\n    fails_first('a')\n    {again}")
    code, lines = suite.run()
    assert code == 1
    assert lines[-1] == "did not pass when run again: test_a.py::test_a"


def test_what_a_tests_own_fixtures_do_is_run_again_with_it(suite: Suite) -> None:
    suite.add(
        "test_a.py",
        "@pytest.fixture\ndef sets_up():\n    fails_first('setup')\n"
        "@pytest.fixture\ndef tears_down():\n    yield\n    fails_first('teardown')\n"
        "def test_a(sets_up): pass\ndef test_b(tears_down): pass\ndef test_c(): pass\n",
    )
    code, lines = suite.run()
    assert code == 0
    assert [lines[-4], lines[-2]] == ["FLAKY test_a.py::test_a", "FLAKY test_a.py::test_b"]


@pytest.mark.parametrize("args", [[], XDIST], ids=["one process", "xdist"])
def test_what_a_shared_fixture_finds_at_its_end_stays_a_failure(suite: Suite, args: list[str]) -> None:
    """The last test does not even use it, and would pass alone."""
    suite.add(
        "test_a.py",
        "@pytest.fixture(scope='module')\ndef shared():\n    yield\n    assert not 'something left'\n"
        "def test_a(shared): pass\ndef test_b(): pass\n",
    )
    code, lines = suite.run(*args)
    assert code == 1
    assert lines[-1].startswith("not run again: what failed after test_a.py::test_b may be a fixture shared")
    assert suite.times == {"test_a": 1, "test_b": 1}
