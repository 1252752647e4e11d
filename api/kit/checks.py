"""Checks that requests for several kinds of resource share."""

from __future__ import annotations

import re

from heliostat.errors import InvalidRequest
from heliostat.models.jobs import MASK

TAG_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
MAX_TAGS = 50
MAX_ENV_BYTES = 256 * 1024
"""Of all env values of a job or of a service's version, names included."""


def check_tags(tags: dict[str, str], field: str = "tags") -> None:
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"{len(tags)} tags are too many.", remedy=f"Give at most {MAX_TAGS}.", field=field)
    for key, value in tags.items():
        if not TAG_KEY.fullmatch(key) or len(value) > 255:
            raise InvalidRequest(
                f"Tag {key!r} is not valid.",
                remedy="Keys: up to 63 of A-Z a-z 0-9 . _ / -, beginning with a letter or digit; "
                "values: up to 255 characters.",
                field=field,
            )


def check_env(env_vars: dict[str, str], field: str = "env_vars") -> None:
    for key, value in env_vars.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key) or "\0" in value:
            raise InvalidRequest(
                f"{key!r} can't be an environment variable.", remedy="Use letters, digits and _.", field=field
            )
        if value == MASK:
            raise InvalidRequest(
                f"The value of {key!r} is the mask that answers show instead of it.",
                remedy="Send the value itself: the API never returns it.",
                field=f"{field}.{key}",
            )


def check_env_size(env_vars: dict[str, str], field: str) -> None:
    size = sum(len(key) + len(value.encode()) for key, value in env_vars.items())
    if size > MAX_ENV_BYTES:
        raise InvalidRequest(
            f"The environment variables have {size} bytes.",
            remedy=f"Keep them below {MAX_ENV_BYTES}; put larger values into a file.",
            field=field,
        )
