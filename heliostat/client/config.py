"""Where the client finds the API and its token.

Each of the two comes from the first of these that has it:

1. the caller's arguments (``Client(host=…, token=…)``, the CLI's ``--host`` and ``--token-file``);
2. ``HELIOSTAT_HOST``, ``HELIOSTAT_TOKEN``;
3. the credentials file that ``heliostat login`` writes, ``$XDG_CONFIG_HOME/heliostat/credentials.json``
   (default ``~/.config``), mode 0600;
4. ``stack.json`` in ``HELIOSTAT_HOME`` (default ``~/.heliostat``), which ``make up`` writes on this machine.

A stored token is only sent to the host that it was stored for.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heliostat.errors import UserError


@dataclass(frozen=True)
class Target:
    """An API, and where its host and token come from. ``token`` is "" when none was found."""

    host: str
    token: str = field(repr=False)
    host_from: str
    token_from: str


def credentials_path() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "heliostat" / "credentials.json"


def stack_path() -> Path:
    return Path(os.environ.get("HELIOSTAT_HOME") or Path.home() / ".heliostat") / "stack.json"


def resolve(host: str | None = None, token: str | None = None) -> Target:
    """The API to call. Raises UserError when no host is configured or one is malformed."""
    stored = _stored()
    stack = _read(stack_path())
    stack_url = _stack_url(stack)
    candidates = [
        (host, "given"),
        (os.environ.get("HELIOSTAT_HOST"), "from HELIOSTAT_HOST"),
        (stored.get("current"), f"from {credentials_path()}"),
        (stack_url, f"from {stack_path()}"),
    ]
    found = next(((value, source) for value, source in candidates if value), None)
    if found is None:
        raise UserError(
            "No Heliostat server is configured.",
            remedy="Start one with `make up`, log in to one with `heliostat login --host URL`, or set HELIOSTAT_HOST.",
        )
    url = normal_host(str(found[0]), found[1])

    def from_stack() -> str:
        return _stack_token(stack) if stack_url and url == normal_host(stack_url) else ""

    tokens = [
        (token, "given"),
        (os.environ.get("HELIOSTAT_TOKEN"), "from HELIOSTAT_TOKEN"),
        (stored["tokens"].get(url), f"from {credentials_path()}"),
        (from_stack(), f"from the token file that {stack_path()} names"),
    ]
    secret, source = next(((value, source) for value, source in tokens if value), ("", "missing"))
    return Target(host=url, token=str(secret).strip(), host_from=found[1], token_from=source)


def normal_host(host: str, source: str = "given") -> str:
    url = host.strip().rstrip("/")
    url = url.removesuffix("/v1")
    if not url.startswith(("http://", "https://")) or len(url.split("://", 1)[1]) == 0:
        raise UserError(
            f"{host!r} ({source}) is not the address of a Heliostat API.",
            remedy="Write it as http://host:port or https://host.",
        )
    return url


def store(host: str, token: str) -> Path:
    """Stores the token for this host and makes the host the current one."""
    stored = _stored()
    url = normal_host(host)
    stored["tokens"][url] = token
    stored["current"] = url
    path = credentials_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # mkstemp is 0600 from the first byte; the rename makes it whole or absent.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".credentials-")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(stored, file, indent=2)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise
    return path


def _stored() -> dict[str, Any]:
    path = credentials_path()
    stored = _read(path)
    if stored and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UserError(
            f"Other users can read {path}, which contains tokens.",
            remedy=f"Run `chmod 600 {path}`, and create a new token.",
            resource=str(path),
        )
    tokens = stored.get("tokens")
    return {"current": stored.get("current"), "tokens": tokens if isinstance(tokens, dict) else {}}


def _stack_url(stack: dict[str, Any]) -> str:
    return str(stack.get("api_url") or "")


def _stack_token(stack: dict[str, Any]) -> str:
    path = stack.get("token_file")
    if not path:
        return ""
    try:
        return Path(str(path)).read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(
            f"The token file {path} can't be read: {error.strerror}.",
            remedy="Use the account that started the stack, or `heliostat login` with your own token.",
            resource=str(path),
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}.", remedy="Repair or remove it.", resource=str(path)) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a valid Heliostat file.", remedy="Repair or remove it.", resource=str(path))
    return content
