"""SQL is in ``store/`` alone: what a statement means is read, and tested on both databases, in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DRIVERS = {"sqlalchemy", "sqlite3", "aiosqlite", "asyncpg"}


@pytest.mark.parametrize("folder", ["activities", "workflows", "clouds", "runtime", "heliostat"])
def test_nothing_outside_the_store_can_write_a_statement(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = DRIVERS & {m.partition(".")[0] for m in modules}
            assert not found, f"{path.relative_to(ROOT)} imports {', '.join(found)}: put the statement into store/"
