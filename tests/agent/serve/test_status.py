from __future__ import annotations

from agent.serve.status import summarize_message
from tests.agent.serve.support import (
    SECRET,
)


def test_serves_words_in_one_line() -> None:
    traceback = "Traceback (most recent call last):\n  File x\n    import y\nModuleNotFoundError: No module named 'y'\n"
    said = summarize_message(f"Deploying app 'd' failed with exception:\n{traceback}", [])
    assert said == "Deploying app 'd' failed with exception: ModuleNotFoundError: No module named 'y'"
    assert summarize_message("", []) == ""
    assert summarize_message(f"a {SECRET}!", [SECRET]) == "a ********!"
    assert len(summarize_message("x" * 5000, [])) == 500
