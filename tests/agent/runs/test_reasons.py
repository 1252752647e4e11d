"""Messages as Ray 2.60 writes them."""

import pytest

from agent.runs.reasons import MAX_CHARS, summarize

HEAD = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n"
RAYS = "2026-11-23 07:38:20\tINFO job_manager.py:581 -- Runtime env is setting up.\nRunning entrypoint for job j: x\n"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (HEAD.format(1) + RAYS + "before\nTraceback (most recent call last):\nValueError: kaputt\n",
         "exit code 1: ValueError: kaputt"),
        (HEAD.format(3) + RAYS, "exit code 3"),
        (HEAD.format(127) + "/bin/sh: 1: ./no.sh: not found\n" + RAYS,
         "the entry point was not found (exit code 127): /bin/sh: 1: ./no.sh: not found"),
        (HEAD.format(126) + RAYS + "/bin/sh: 1: ./a: Permission denied\n",
         "the entry point can't be executed (exit code 126): /bin/sh: 1: ./a: Permission denied"),
        (HEAD.format(-9) + RAYS + "x\n", "killed by SIGKILL (exit code -9)"),
        (HEAD.format(137) + RAYS, "killed by SIGKILL (exit code 137)"),
        (HEAD.format(200) + RAYS, "exit code 200"),
        ("Job was intentionally stopped.", "Job was intentionally stopped."),
        ("", ""),
        ("runtime_env setup failed: Failed.\n[Node 1] Traceback (most recent call last):\n"
         "  File \"/x/pip.py\", line 1, in _run\n"
         "ray.SubprocessCalledProcessError: Run cmd[9] failed with the following details.\n"
         "Last 50 lines of stdout:\n"
         "    ERROR: Could not find a version that satisfies the requirement no-such==99 (from versions: none)\n"
         "    ERROR: No matching distribution found for no-such==99\n",
         "the runtime environment could not be created: Could not find a version that satisfies the requirement "
         "no-such==99 (from versions: none); No matching distribution found for no-such==99"),
        ("runtime_env setup failed: Failed.\nTraceback (most recent call last):\n  File \"x\"\n"
         "OSError: HTTP 404 for http://x/y.zip\n",
         "the runtime environment could not be created: OSError: HTTP 404 for http://x/y.zip"),
    ],
)  # fmt: skip
def test_one_line(message: str, reason: str) -> None:
    assert summarize(message) == reason


def test_is_bounded() -> None:
    assert len(summarize("a" * 10_000)) == MAX_CHARS
