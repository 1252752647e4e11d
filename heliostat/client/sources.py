"""Config files and the position of each field in them, so that an error names ``job.yaml:12:3``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heliostat.errors import InvalidRequest

if TYPE_CHECKING:
    from yaml.nodes import Node

ROOT = ""
MERGE = "tag:yaml.org,2002:merge"
"""The path of the whole file."""


@dataclass(frozen=True)
class Source:
    """The source of fields. Paths are dotted, as in errors: ``worker_nodes.1.min_nodes``."""

    name: str
    """Name of a file, or "the command line"."""
    marks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Line and column by path, both from 1."""
    parts: Mapping[str, Source] = field(default_factory=dict)
    """Other sources by path: flags override fields of a file, and a flag can name another file."""

    def at(self, path: str) -> str:
        """``job.yaml:12:3``: the position of the field or, if it is missing, of the nearest field around it."""
        for outer in _outwards(path):
            if outer in self.parts:
                return self.parts[outer].at(path[len(outer) + 1 :])
            if outer in self.marks:
                line, column = self.marks[outer]
                return f"{self.name}:{line}:{column}"
        return self.name

    def replaced(self, values: Mapping[str, Any], prefix: str = ROOT) -> Source:
        """This source after flags have replaced these fields."""
        new = {prefix + name: getattr(value, "source", COMMAND_LINE) for name, value in values.items()}
        return replace(self, parts={**self.parts, **new})


COMMAND_LINE = Source("the command line")


class Document(dict[str, Any]):
    """The mapping in a file, with its source."""

    def __init__(self, fields: Mapping[str, Any], source: Source) -> None:
        super().__init__(fields)
        self.source = source


def load(path: str | Path) -> Document:
    """Reads YAML or JSON. Raises InvalidRequest (missing, malformed, not one mapping, a duplicate field)."""
    import yaml

    try:
        loader = yaml.SafeLoader(Path(path).read_text())
        try:
            root = loader.get_single_node()
            marks = _marks(root, str(path)) if root is not None else {}
            content = loader.construct_document(root) if root is not None else None
        finally:
            loader.dispose()
    except OSError as error:
        raise InvalidRequest(
            f"The file {str(path)!r} can't be read: {error.strerror}.",
            remedy="A relative path starts at the current directory.",
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        why = ", ".join(part for part in (error.context, error.problem) if part)
        raise InvalidRequest(f"{where}: this is not valid YAML: {why}.", remedy="Correct the file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{path} is not valid YAML: {' '.join(str(error).split())}.", remedy="Correct the file."
        ) from error
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} does not hold a mapping.", remedy="Write 'field: value' lines; see the examples.")
    return Document(content, Source(str(path), marks))


def _outwards(path: str) -> Iterable[str]:
    """``a.b.c``, ``a.b``, ``a``, and the root."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ROOT


def _marks(root: Node, name: str) -> dict[str, tuple[int, int]]:
    """Positions by path. Raises InvalidRequest for a duplicate field: PyYAML silently takes the last one."""
    from yaml.nodes import CollectionNode, SequenceNode

    marks: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()

    def place(node: Node) -> tuple[int, int]:
        return node.start_mark.line + 1, node.start_mark.column + 1

    def visit(node: Node, path: str) -> None:
        if not isinstance(node, CollectionNode) or id(node) in seen:  # an alias: its content is at the anchor
            return
        seen.add(id(node))
        prefix = f"{path}." if path else ROOT
        if isinstance(node, SequenceNode):
            for number, item in enumerate(node.value):
                marks[f"{prefix}{number}"] = place(item)
                visit(item, f"{prefix}{number}")
            return
        first: dict[tuple[str, str], tuple[int, int]] = {}
        for key, value in node.value:
            if not isinstance(key.value, str):
                continue  # not the name of a field: an error later
            twin = first.setdefault((key.tag, key.value), place(key))
            # Several merges (``<<``) lose nothing: each adds to the others.
            if twin != place(key) and key.tag != MERGE:
                line, column = place(key)
                raise InvalidRequest(
                    f"{name}:{line}:{column}: {prefix}{key.value} is a duplicate of line {twin[0]}.",
                    remedy="Remove one of the two.",
                    field=f"{prefix}{key.value}",
                )
            marks[f"{prefix}{key.value}"] = place(key)
            visit(value, f"{prefix}{key.value}")

    marks[ROOT] = place(root)
    visit(root, ROOT)
    return marks
