"""Who holds a connection takes no second one: with a small pool, requests that do wait for each other for ever."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("api", "activities", "store") for path in sorted((ROOT / folder).rglob("*.py"))]


def _is_database(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr in ("db", "_db")) or (
        isinstance(node, ast.Name) and node.id in ("db", "database")
    )


def _opens(call: ast.Call) -> bool:
    called = call.func
    return isinstance(called, ast.Attribute) and called.attr in ("read", "begin") and _is_database(called.value)


def _holders(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Bodies of functions that are given a connection, and of blocks that open one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            if any(a.arg == "conn" for a in (*node.args.args, *node.args.kwonlyargs)):
                yield node.body
        elif isinstance(node, ast.AsyncWith):
            calls = [i.context_expr for i in node.items if isinstance(i.context_expr, ast.Call)]
            if any(_opens(call) for call in calls):
                yield node.body


def second_connections(source: str) -> list[int]:
    """Lines of calls that may open another connection while one is held."""
    return sorted(
        {
            call.lineno
            for body in _holders(ast.parse(source))
            for statement in body
            for call in ast.walk(statement)
            if isinstance(call, ast.Call) and (_opens(call) or any(_is_database(a) for a in call.args))
        }
    )


GIVEN = """
async def check(conn):
    await load(ctx.db, 1)
"""
OPENED = """
async def check():
    async with ctx.db.read() as conn:
        async with self._db.begin() as other:
            pass
"""
ONE_BY_ONE = """
async def check():
    async with ctx.db.read() as conn:
        await load(conn, 1)
    await load(ctx.db, 1)
"""


def test_it_finds_what_it_should() -> None:
    assert [second_connections(source) for source in (GIVEN, OPENED, ONE_BY_ONE)] == [[3], [4], []]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_who_holds_a_connection_takes_no_second_one(path: Path) -> None:
    assert second_connections(path.read_text()) == []
