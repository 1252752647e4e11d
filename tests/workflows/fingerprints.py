"""What each workflow does to its history, in the order of the source: the net that catches an edit without a patch
which no saved history happens to cover. ``python -m tests.workflows.fingerprints`` writes it anew."""

from __future__ import annotations

import ast
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).parent / "fingerprints.json"

COMMANDS = {
    "execute_activity",
    "execute_activity_method",
    "start_activity",
    "start_activity_method",
    "execute_local_activity",
    "execute_local_activity_method",
    "start_local_activity_method",
    "execute_child_workflow",
    "start_child_workflow",
    "sleep",
    "patched",
    "deprecate_patch",
    "upsert_search_attributes",
    "upsert_memo",
    "continue_as_new",
    "uuid4",
    "random",
}
"""Calls on ``workflow`` that write commands, or that a replay must make in the same order."""

KERNEL = {"run_command", "release_cluster"}
"""Functions of ``workflows.entity`` that write commands for their callers."""


def commands_of(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    found: list[tuple[int, int, str]] = []
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        name = ast.unparse(call.func)
        last = name.rpartition(".")[2]
        if name.startswith("workflow.") and last in COMMANDS:
            what = ast.unparse(call.args[0]) if call.args and last not in ("sleep", "continue_as_new") else ""
            found.append((call.lineno, call.col_offset, f"{last} {what}".strip()))
        elif name in KERNEL:
            found.append((call.lineno, call.col_offset, name))
        elif last == "wait_condition" and any(k.arg == "timeout" for k in call.keywords):
            found.append((call.lineno, call.col_offset, "wait_condition with timeout"))
        elif last == "signal" and "get_external_workflow_handle" in name:
            found.append((call.lineno, call.col_offset, f"signal {ast.unparse(call.args[0])}"))
    functions = node.body if isinstance(node, ast.ClassDef) else [node]
    methods = {n.name: n.lineno for n in functions if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    by_line = sorted(methods.items(), key=lambda item: item[1])

    def method(line: int) -> str:
        return [name for name, start in by_line if start <= line][-1]

    return [f"{method(line)}: {what}" for line, _, what in sorted(found)]


def fingerprints() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "workflows").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                commands = commands_of(node)
                # The parts of a workflow too: what they do, it does.
                if commands or any("workflow.defn" in ast.unparse(d) for d in node.decorator_list):
                    assert node.name not in found, f"two classes of the name {node.name}"
                    found[node.name] = commands
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (commands := commands_of(node)):
                found.setdefault(module, []).extend(commands)
    return found


def main() -> None:
    FILE.write_text(json.dumps(fingerprints(), indent=1, sort_keys=True) + "\n")
    print(f"wrote {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
