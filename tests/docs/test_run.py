"""The commands of the tutorials and of the how-to pages for the ``local`` cloud, run in the order of the page by a real
shell in a copy of the checkout. Those of the pages on AWS and Google Cloud run in the lab, with the same reader:
``tests/e2e/test_lab_aws.py``, ``test_lab_gcp.py``.

A comment right before a block tells this test what the page's reader knows anyway:

- ``<!-- not run: REASON -->``: the block is left out;
- ``<!-- run first: COMMAND -->``: what the reader has at this point, e.g. a job of that name;
- ``<!-- file: NAME -->``: the block is the content of this file;
- ``<!-- exit code: N -->``: its last command ends so, and the page says it;
- ``<!-- interrupted -->``: its commands go on until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.stack import running
from clouds.fake.agent import Behaviour
from tests.docs.pages import ROOT, Block, blocks, commands
from tests.e2e.support import Stack, clean_environment

TUTORIALS = ["tutorial/first-job.md", "tutorial/first-service.md"]
HOW_TO = [f"how-to/{name}.md" for name in ("schedules", "machines", "retries", "logs", "services", "rollouts")]
NO_RAY = HOW_TO[:2]
IN_THE_LAB = ["how-to/aws.md", "how-to/gcp.md"]
README = "../README.md"
KINDS = {"not run", "run first", "file", "exit code", "interrupted"}
LISTENS_S = 12
"""How long a command that goes on is listened to before its Ctrl-C."""


def blocks_of(page: str) -> list[Block]:
    """What the reader types and the files that they write, in the order of the page."""
    here = (ROOT / "docs" / page).resolve()
    files = [b for b in blocks("python") if b.page == here and "file" in dict(b.notes)]
    return sorted([*(b for b in blocks("sh") if b.page == here), *files], key=lambda b: b.line)


class Shell:
    """One bash for a whole page, so ``cd`` and activated environments hold."""

    MARK = "heliostat-page-command-ended"

    def __init__(self, top: Path, env: dict[str, str]) -> None:
        self.output = ""
        self._process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"], cwd=top, env=env | {"TOP": str(top)}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
        )  # fmt: skip

    def run(self, command: str, timeout: float = 420) -> int:
        """The exit code of one command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        script = f"{{ {command}\n}} </dev/null\nprintf '\\n%s %d\\n' {self.MARK} $?\n"
        self._process.stdin.write(script.encode())
        deadline, said = time.monotonic() + timeout, b""
        while not (ended := re.search(rf"\n{self.MARK} (\d+)\n".encode(), said)):
            assert time.monotonic() < deadline, f"{command}: runs for more than {timeout:.0f} s\n{said.decode()}"
            if select.select([self._process.stdout], [], [], 1)[0]:
                piece = os.read(self._process.stdout.fileno(), 65536)
                assert piece, f"{command}: the shell has ended\n{said.decode()}"
                said += piece
        self.output = said[: ended.start()].decode(errors="replace")
        return int(ended[1])

    def close(self) -> None:
        """Ends the command that still runs, too."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@contextmanager
def checkout() -> Iterator[Path]:
    """What stands in for the reader's checkout: its own examples, everything else is ours. It stays when a test
    fails."""
    top = Path(tempfile.mkdtemp(prefix="docs-run-"))
    for entry in ROOT.iterdir():
        if entry.name not in ("examples", ".git", ".flaky"):
            (top / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "examples", top / "examples")
    (top / "user").mkdir()
    yield top
    shutil.rmtree(top)


def run_page(page: str, env: dict[str, str], instead: Callable[[Path], None] | None = None) -> None:
    """``instead`` gets the checkout where a block is not run, and does there what its commands would do."""
    with checkout() as top:
        shell = Shell(top, env | {"HOME": str(top / "user")})
        try:
            assert shell.run(". .venv/bin/activate") == 0
            for block in blocks_of(page):
                run_block(shell, block)
                if instead is not None and "not run" in dict(block.notes):
                    instead(top)
        finally:
            shell.close()


def run_block(shell: Shell, block: Block) -> None:
    notes = dict(block.notes)
    if "not run" in notes:
        print(f"{block}: not run: {notes['not run']}")
        return
    for kind, text in block.notes:
        if kind == "run first":
            assert shell.run(text) == 0, f"{block}: {text}\n{shell.output}"
    if "file" in notes:
        assert shell.run(f"cat > {notes['file']} <<'END OF FILE'\n{block.text}\nEND OF FILE") == 0, shell.output
        return
    lines = [line for line in block.text.replace("\\\n", " ").splitlines() if re.sub(r"\s*#.*", "", line).strip()]
    for line in lines:
        wanted = int(notes.get("exit code", 0)) if line == lines[-1] else 0
        if "interrupted" in notes:
            line, wanted = f"timeout --preserve-status -s INT {LISTENS_S} {line}", 130
        began = time.monotonic()
        code = shell.run(line)
        print(f"{block}: {time.monotonic() - began:5.1f} s, exit code {code}: {line}\n{shell.output}")
        assert code == wanted, f"{block}: {line}\nexit code {code}, not {wanted}:\n{shell.output}"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Shared by the how-to pages."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-docs-"))
    stack = Stack(folder / "home")
    try:
        stack.up()
        yield stack
    finally:
        left = stack.dispose()
    assert not left, left
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1700)
@pytest.mark.parametrize("page", [*TUTORIALS, README])
def test_a_page_for_beginners(page: str) -> None:
    """On a control plane of its own: the first tutorial starts it, and some of them end it."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-docs-"))
    stack = Stack(folder / "home")
    try:
        if page != TUTORIALS[0]:
            stack.up()
        run_page(page, stack.env)
    finally:
        left = stack.dispose()
    assert not left, left
    shutil.rmtree(folder)


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(1700)
@pytest.mark.parametrize("page", HOW_TO)
def test_a_page_of_the_local_cloud(page: str, stack: Stack) -> None:
    run_page(page, stack.env)


def test_pages_on_the_fake_cloud() -> None:
    """Some pages in each run of the tests, without Ray."""

    async def scenario() -> None:
        async with running(fake=Behaviour(run_s=0.1)) as (stack, _):
            env = clean_environment() | {"HELIOSTAT_HOME": str(stack.home.path)}
            for page in NO_RAY:
                await asyncio.to_thread(run_page, page, env)

    asyncio.run(scenario())


@pytest.mark.parametrize("page", [*TUTORIALS, *HOW_TO, *IN_THE_LAB, README])
def test_what_is_not_run_says_why(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for block in blocks_of(page):
        notes = dict(block.notes)
        assert notes.keys() <= KINDS, f"{block}: {notes}"
        assert len(notes.get("not run", "no reason is needed").split()) >= 3, block
        if page in IN_THE_LAB and "not run" in notes:
            assert all(words[0] != "heliostat" for words in commands(block)), f"{block}: only vendors' tools"
        code = "130" if "interrupted" in notes else notes.get("exit code", "0")
        assert code == "0" or re.search(rf"exit\s+code(?:\s+is)?\s+{code}\b|Ctrl-C", text), f"{block}: exit code {code}"
