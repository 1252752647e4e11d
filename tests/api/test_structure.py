"""What import contracts can't see: private names stay in their modules."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of each import; the name is empty in ``import module``."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def test_no_module_of_the_api_imports_a_private_name() -> None:
    private = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in modules("api")
        for module, name in imports(path)
        if any(part.startswith("_") and not part.startswith("__") for part in (*module.split("."), name))
    ]
    assert private == []
