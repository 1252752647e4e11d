"""The operator's price table: what a node costs an hour. We ship none, for prices are a contract's business.

CSV with a head line: ``provider,region,instance_type,market,usd_per_hour``. ``region`` may be ``*``; ``market`` is
``ON_DEMAND`` or ``SPOT``. A line for the region overrides one for ``*``.
"""

from __future__ import annotations

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

from heliostat.errors import Unavailable
from heliostat.models.clouds import Market, Provider
from runtime.settings import Settings

COLUMNS = ("provider", "region", "instance_type", "market", "usd_per_hour")
MARKETS = (Market.ON_DEMAND, Market.SPOT)


@dataclass(frozen=True)
class Prices:
    path: Path | None
    """None: there is no table."""
    usd: dict[tuple[str, str, str, str], float]

    def of(self, provider: str, region: str, instance_type: str, market: Market) -> float | None:
        """USD an hour; None: not in the table."""
        for where in (region, "*"):
            found = self.usd.get((provider, where, instance_type, market.value))
            if found is not None:
                return found
        return None


def load(settings: Settings) -> Prices:
    """HELIOSTAT_PRICES, else ``prices.csv`` in the home if there is one; read again when the file changes. Raises
    Unavailable, with the file and the line, for one that can't be read."""
    path = settings.prices or settings.home / "prices.csv"
    try:
        stamp = path.stat()
    except FileNotFoundError as e:
        if settings.prices is None:
            return Prices(None, {})
        raise _unreadable(path, "there is no such file") from e
    except OSError as e:
        raise _unreadable(path, str(e.strerror)) from e
    return _read(path, stamp.st_mtime_ns, stamp.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: Path, _changed: int, _size: int) -> Prices:
    found: dict[tuple[str, str, str, str], float] = {}
    try:
        with path.open(newline="") as f:
            reader = csv.reader(f)
            head = [name.strip() for name in next(reader, [])]
            if sorted(head) != sorted(COLUMNS):
                raise _unreadable(path, f"line 1 is {','.join(head)!r}, not the columns {','.join(COLUMNS)}")
            for row in reader:
                if row:
                    key, usd = _line(path, reader.line_num, head, row)
                    if key in found:
                        raise _unreadable(path, f"line {reader.line_num} says a price again: {' '.join(key)}")
                    found[key] = usd
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise _unreadable(path, str(e)) from e
    return Prices(path, found)


def _line(path: Path, number: int, head: list[str], row: list[str]) -> tuple[tuple[str, str, str, str], float]:
    if len(row) != len(head):
        raise _unreadable(path, f"line {number} has {len(row)} columns instead of {len(head)}")
    said = {name: cell.strip() for name, cell in zip(head, row, strict=True)}
    if said["provider"] not in tuple(Provider):
        raise _unreadable(path, f"line {number}: {said['provider']!r} is not a provider ({', '.join(Provider)})")
    if said["market"] not in MARKETS:
        raise _unreadable(path, f"line {number}: {said['market']!r} is not a market ({', '.join(MARKETS)})")
    if not said["region"] or not said["instance_type"]:
        raise _unreadable(path, f"line {number} lacks its region or instance type")
    try:
        usd = float(said["usd_per_hour"])
    except ValueError:
        usd = math.nan
    if not 0 <= usd < 100_000:
        raise _unreadable(path, f"line {number}: {said['usd_per_hour']!r} is not a price in USD an hour")
    return (said["provider"], said["region"], said["instance_type"], said["market"]), usd


def _unreadable(path: Path, why: str) -> Unavailable:
    return Unavailable(
        f"The price table {path} can't be read: {why}.",
        remedy=f"An operator must correct it: CSV with the columns {','.join(COLUMNS)}.",
        resource=str(path),
    )
