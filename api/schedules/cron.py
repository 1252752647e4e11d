"""Cron expressions, checked here because Temporal's own rules differ from cron's in ways that would surprise:
it takes a sixth field as the year, and requires day of month *and* day of week to match where cron requires either."""

from __future__ import annotations

import re

from heliostat.errors import InvalidRequest

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
_SHORTHANDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_LONGEST_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def parse(expression: str, field: str = "cron_expression") -> list[str]:
    """The cron strings that mean this expression to Temporal, any of which fires. Raises InvalidRequest."""
    text = " ".join(expression.split()).lower()
    if text in _SHORTHANDS:
        return [text]
    if re.fullmatch(r"@every (\d+[smhd])+", text) and any(int(n) for n in re.findall(r"\d+", text)):
        return [text]
    if text.startswith("@"):
        raise _refused(
            field, expression, f"{text.split()[0]} is not supported; supported are {', '.join(_SHORTHANDS)}, @every 90s"
        )
    parts = text.split()
    if len(parts) in (6, 7):
        raise _refused(field, expression, f"it has {len(parts)} fields; seconds and years are not supported")
    if len(parts) != 5:
        raise _refused(field, expression, f"it has {len(parts)} fields instead of 5")
    values = [_values(field, expression, part, *spec) for part, spec in zip(parts, _FIELDS, strict=True)]
    minute, hour, day, month, weekday = parts
    if min(values[2]) > max(_LONGEST_MONTH[m - 1] for m in values[3]) and weekday == "*":
        raise _refused(field, expression, "no month has such a day")
    if "*" in (day[0], weekday[0]):
        return [" ".join(parts)]
    return [f"{minute} {hour} {day} {month} *", f"{minute} {hour} * {month} {weekday}"]  # cron: either day is enough


def _values(field: str, expression: str, part: str, what: str, low: int, high: int, names: tuple[str, ...]) -> set[int]:
    def number(text: str) -> int:
        if text in names:
            return names.index(text) + (1 if low == 1 else 0)
        if not text.isascii() or not text.isdigit() or not low <= int(text) <= high:
            allowed = f"{low} to {high}" + (f" or {names[0]}…{names[-1]}" if names else "")
            raise _refused(field, expression, f"{text!r} is not a valid {what} ({allowed})")
        return int(text)

    found: set[int] = set()
    for item in part.split(","):
        span, slash, step = item.partition("/")
        if slash and (not step.isascii() or not step.isdigit() or int(step) == 0):
            raise _refused(field, expression, f"{step!r} is not a valid step of {what}")
        if span == "*":
            first, last = low, high
        elif "-" in span:
            start, _, end = span.partition("-")
            first, last = number(start), number(end)
            if first > last:
                raise _refused(field, expression, f"the {what} range {span!r} ends before it begins")
        else:
            first = number(span)
            last = high if slash else first
        found.update(range(first, last + 1, int(step) if slash else 1))
    return found


def _refused(field: str, expression: str, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The cron expression {expression!r} is not valid: {why}.",
        remedy="Write 'minute hour day-of-month month day-of-week', e.g. '30 2 * * mon-fri'.",
        field=field,
    )
