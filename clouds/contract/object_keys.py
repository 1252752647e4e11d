"""The keys of objects in a bucket, the same on every provider."""

from __future__ import annotations

import re

from heliostat.errors import InvalidRequest

KEY_MAX = 1024
_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=@+,:~-]{1,255}")


def checked(key: str) -> list[str]:
    """The key's segments. Raises InvalidRequest for what is no key, so that nothing outside a bucket has one."""
    segments = key.split("/")
    if len(key) > KEY_MAX or not all(_SEGMENT.fullmatch(s) and s not in (".", "..") for s in segments):
        raise InvalidRequest(
            f"{key[:100]!r} is not a valid object key.",
            remedy="Use letters, digits and !_.*'()=@+,:~- in segments of up to 255, parted by '/'.",
            field="key",
        )
    return segments
