"""What ``cloud verify`` finds, line by line: the list, and the lines that are the same on every cloud."""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urlsplit

from clouds.contract.bucket import Bucket
from clouds.contract.errors import Denied
from heliostat.errors import CloudError
from heliostat.models.clouds import Check, CheckState

SKEW_S, MAX_SKEW_S = 30.0, 240.0
"""A clock that is off by so much should be looked at, and one by so much does not work: AWS refuses requests that are
5 minutes old, Google tokens that are as far ahead."""
SERVE_PORTS = (8000, 9000)
"""Of a head's HTTP and gRPC proxies on a machine of its own (``agent.boot.Ports``)."""

PROBE = "heliostat-verify/"
"""Below this, in the cloud's prefix, one object is made and deleted again."""
_DATA = b"heliostat"

Answer = TypeVar("Answer")


class Checklist:
    """Lines in the order of their finding.

    Args:
        granting: what to do about a refusal: the policy line to add.
    """

    def __init__(self, granting: Callable[[Denied], str] = lambda e: e.remedy) -> None:
        self.checks: list[Check] = []
        self._granting = granting

    def ok(self, name: str, detail: str = "") -> None:
        self._add(name, CheckState.OK, detail)

    def warn(self, name: str, detail: str, remedy: str = "") -> None:
        self._add(name, CheckState.WARNING, detail, remedy)

    def fail(self, name: str, detail: str, remedy: str = "") -> None:
        self._add(name, CheckState.FAILED, detail, remedy)

    def skip(self, name: str, detail: str, remedy: str = "") -> None:
        self._add(name, CheckState.SKIPPED, detail, remedy)

    def behind(self, failed: str, *names: str) -> None:
        """Lines that cannot be known before another one is corrected."""
        for name in names:
            self.skip(name, f"Not checked before `{failed}` is corrected.")

    def ask(self, name: str, what: Callable[[], Answer], *, needed: bool = True) -> Answer | None:
        """The cloud's answer; None when it gave none, which is the line then.

        Args:
            needed: whether running machines takes this right too. Without it the line is skipped, not failed.
        """
        try:
            return what()
        except Denied as e:
            if needed:
                self.fail(name, e.message, self._granting(e))
            else:
                self.skip(name, f"It cannot be read: {e.message}", self._granting(e))
        except CloudError as e:
            self.fail(name, e.message, e.remedy)
        return None

    def failed(self, name: str) -> bool:
        return any(check.name == name and check.state is CheckState.FAILED for check in self.checks)

    def clock(self, name: str, date: str, now: datetime) -> None:
        """Ours against an answer's ``Date``."""
        ahead = (now - parsedate_to_datetime(date)).total_seconds()
        said = f"This host's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the cloud's."
        remedy = "Set it right on the control plane's host (NTP): the cloud refuses requests that are minutes off."
        if abs(ahead) > MAX_SKEW_S:
            self.fail(name, said, remedy)
        elif abs(ahead) > SKEW_S:
            self.warn(name, said, remedy)
        else:
            self.ok(name, f"Within {SKEW_S:.0f} s of the cloud's.")

    def api(self, api_url: str) -> None:
        """Whether machines elsewhere can call the API, as far as its URL shows."""
        name, address = "api_url", address_of(api_url)
        scheme, host = urlsplit(api_url).scheme, urlsplit(api_url).hostname or ""
        remedy = "Set HELIOSTAT_API_URL to what machines of the cloud reach."
        if not host:
            self.fail(name, f"{api_url!r} is not a valid URL.", remedy)
        elif host == "localhost" or (
            address is not None and (address.is_loopback or address.is_unspecified or address.is_link_local)
        ):
            self.fail(name, f"{api_url} is a loopback address: no machine of the cloud can reach it.", remedy)
        elif address is not None and not address.is_global:
            self.warn(name, f"{api_url} is a private address: machines need a private route to it.", remedy)
        elif scheme != "https":
            self.warn(name, f"{api_url} is not https: tokens and commands can be read on the way.", remedy)
        else:
            self.ok(name, f"{api_url}; `--launch` checks whether machines reach it.")

    def bucket_works(self, bucket: Bucket, shown: str) -> None:
        """Writes, reads, lists and deletes a probe. Only if ``bucket`` has not failed before.

        Args:
            shown: the bucket's name and the cloud's prefix.
        """
        write, read, listed, delete = names = ("bucket write", "bucket read", "bucket list", "bucket delete")
        key = f"{PROBE}{uuid.uuid4()}"
        if self.failed("bucket"):
            self.behind("bucket", *names)
            return
        if not self._does(write, lambda: bucket.put(key, _DATA)):
            self.behind(write, read, listed, delete)
            return
        self.ok(write, f"{shown}{key}")
        looks: tuple[tuple[str, Callable[[], bool]], ...] = (
            (read, lambda: bucket.get(key) == _DATA),
            (listed, lambda: key in [stored.key for stored in bucket.list(PROBE)]),
        )
        for name, look in looks:
            same = self.ask(name, look)
            if same:
                self.ok(name)
            elif same is not None:
                self.fail(
                    name,
                    "The object that was read differs from the one written.",
                    "Does a rule of the bucket's delete at once?",
                )
        if self._does(delete, lambda: bucket.delete([key])):
            self.ok(delete, "The probe is gone.")

    def _does(self, name: str, do: Callable[[], None]) -> bool:
        def done() -> bool:
            do()
            return True

        return self.ask(name, done) is True

    def _add(self, name: str, state: CheckState, detail: str, remedy: str = "") -> None:
        self.checks.append(Check(name=name, state=state, detail=detail, remedy=remedy))


def address_of(url: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in a URL; None for a name."""
    try:
        return ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return None
