from __future__ import annotations

from agent.serve.config import immutable_changes, refusal_reason
from tests.agent.serve.support import (
    SECRET,
)


def test_pydantics_words_without_what_was_given() -> None:
    text = ("2 validation errors for ServeDeploySchema\napplications.0.import_path\n  Field required [type=missing, "
            f"input_value={{'env_vars': {{'A': '{SECRET}'}}}}, input_type=dict]\n    For further information visit x\n"
            "applications\n  Value error, twice [type=value_error, input_value=[], input_type=list]\n")  # fmt: skip
    assert refusal_reason(text) == "applications.0.import_path: Field required; applications: Value error, twice"
    assert refusal_reason("Traceback\n  File\nValueError: no\n") == "ValueError: no"


def test_options_of_a_running_proxy_that_would_change_are_named() -> None:
    running = {"http_options": {"host": "h", "request_timeout_s": None, "root_path": ""}, "grpc_options": None}
    wanted = {"http_options": {"host": "h", "request_timeout_s": 3}, "grpc_options": {"port": 1}}
    assert immutable_changes(running, wanted) == ["http_options.request_timeout_s"]
    assert immutable_changes({}, wanted) == []
