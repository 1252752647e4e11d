"""What an answer of the Google Cloud fake may be, and which resources a list's filter lets pass."""

from __future__ import annotations

import json
import re
import zlib
from typing import Any

Resource = dict[str, Any]


class Refused(Exception):
    """An HTTP answer of 400 and above."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message

    def body(self) -> Resource:
        item = {"reason": self.reason, "message": self.message, "domain": "global"}
        return {"error": {"code": self.status, "message": self.message, "errors": [item]}}


def public(r: Resource) -> Resource:
    return {key: value for key, value in r.items() if not key.startswith("_")}


def fingerprint(value: Any) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


_TERM = re.compile(r'\(?\s*([\w.-]+)\s*(=|!=|\beq\b|\bne\b)\s*(?:"([^"]*)"|(\S+?))\s*\)?')


def matches(r: Resource, wanted: str) -> bool:
    """The part of Google's filter language that clients of ours use: terms joined by AND; ``=`` compares, ``eq`` is a
    regular expression of the whole field."""
    for term in wanted.split(" AND ") if wanted else []:
        found = _TERM.fullmatch(term.strip())
        if found is None:
            raise Refused(
                400, "invalid", f"Invalid value for field 'filter': '{wanted}'. Invalid list filter expression."
            )
        name, operator, quoted, bare = found.groups()
        value: Any = r
        for part in name.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        asked = quoted if quoted is not None else bare
        same = re.fullmatch(asked, str(value)) is not None if operator in ("eq", "ne") else str(value) == asked
        if same != (operator in ("=", "eq")):
            return False
    return True
