"""Instance types: what they have, and which of them fit a request. The API needs this before anything is launched.

Each provider has its own catalogue (``clouds.aws.machines.catalogue``, ``clouds.gcp.machines.catalogue``): a CSV file
that ships with Heliostat, or the operator's own in HELIOSTAT_HOME.
"""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from clouds.contract.retained import RetainedResources
from heliostat.errors import Unavailable

MEMORY_PER_CPU = 4 * 2**30
"""Bytes for each CPU of a request that names no memory: the ratio of general-purpose types on AWS and Google Cloud."""
Order = tuple[float | str, ...]


@dataclass(frozen=True)
class InstanceType:
    """One instance type. A provider's subclass adds what else it needs, and ``order``."""

    name: str
    """As a compute config writes it."""
    cpu: int
    """vCPUs."""
    memory: int
    """Bytes."""
    gpu: int
    """Whole ones; a type with a part of one has 0."""
    accelerator: str
    """Name of its GPUs, as the vendor spells it, e.g. ``T4``, ``nvidia-l4``; "": none."""
    architecture: str
    """``x86_64`` or ``arm64``."""
    choosable: bool
    """Whether it may be chosen by its size. Others must be named."""

    def order(self) -> Order:
        """Sort key: the best has the least."""
        raise NotImplementedError


T = TypeVar("T", bound=InstanceType)
T_co = TypeVar("T_co", bound=InstanceType, covariant=True)


class Catalogue(Generic[T_co]):
    def __init__(self, types: Iterable[T_co]) -> None:
        self.types: Mapping[str, T_co] = {t.name: t for t in types}
        choosable = [t for t in self.types.values() if t.choosable]
        self.max_cpu = max((t.cpu for t in choosable), default=0)
        self.max_memory = max((t.memory for t in choosable), default=0)
        self.max_gpu = max((t.gpu for t in choosable), default=0)

    def only(self, names: Iterable[str] | None) -> Catalogue[T_co]:
        """Those of these names, all of which may be chosen; None: the whole catalogue."""
        if names is None:
            return self
        named = [t for name in names if (t := self.types.get(name)) is not None]
        return Catalogue(replace(t, choosable=True) for t in named)

    def candidates(
        self,
        cpu: float = 0,
        memory: int | None = None,
        gpu: int = 0,
        accelerator: str = "",
        architecture: str = "x86_64",
    ) -> list[T_co]:
        """Types that have at least that, best first: fewest GPUs, then by the provider's ``order``.

        Args:
            memory: bytes; None: as much as general-purpose types of so many CPUs have, if one has that much.
            accelerator: see :func:`is_accelerator`; "": any.
        """
        least = cpu if gpu else max(cpu, 2)  # types with one CPU are offered in few zones
        wanted = memory if memory is not None else 0 if gpu else int(least * MEMORY_PER_CPU)
        fit = [
            t
            for t in self.types.values()
            if t.choosable
            and t.architecture == architecture
            and t.cpu >= least
            and (t.gpu >= gpu if gpu else t.gpu == 0)
            and (not accelerator or is_accelerator(accelerator, t.accelerator))
        ]
        roomy = [t for t in fit if t.memory >= wanted]
        if memory is None and not roomy:
            roomy = fit
        return sorted(roomy, key=_order)


def _order(one: InstanceType) -> Order:
    return one.order()


def load(kind: type[T], path: Path) -> Catalogue[T]:
    """Raises OSError, and ValueError for a file that is not a catalogue of that kind."""
    row = TypeAdapter(kind)
    with path.open(newline="") as f:
        return Catalogue(row.validate_python(line) for line in csv.DictReader(f))


def save(kind: type[T], catalogue: Catalogue[T], path: Path) -> None:
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        for name in sorted(catalogue.types):
            row = asdict(catalogue.types[name])
            writer.writerow(row | {"choosable": int(row["choosable"])})


def own_or_shipped(
    path: Path, load: Callable[[Path], Catalogue[T]], shipped: Callable[[], Catalogue[T]], module: str
) -> Catalogue[T]:
    """The operator's own catalogue where there is one. Raises Unavailable for one that cannot be read.

    Args:
        module: makes it anew.
    """
    if not path.exists():
        return shipped()
    try:
        return load(path)
    except (OSError, ValueError) as e:
        raise Unavailable(
            f"The catalogue of instance types {path} cannot be read: {type(e).__name__}: {e}.",
            remedy=f"Create it again with `python -m {module} refresh`, or remove it.",
            resource=str(path),
        ) from e


@dataclass(frozen=True)
class Offer:
    """What one provider offers, in all of its clouds."""

    catalogue: Catalogue[InstanceType]
    check_advanced: Callable[[Mapping[str, Any], RetainedResources | None], None]
    """Raises BadConfig, whose ``field`` is a path within it, for an ``advanced_instance_config`` that a launch would
    refuse, beside what its node keeps."""


def is_accelerator(wanted: str, has: str) -> bool:
    """Whether GPUs that the vendor calls ``has`` are what a person calls ``wanted``: ``T4`` is ``nvidia-tesla-t4``, and
    ``A100`` is ``nvidia-a100-80gb``, too."""
    return _plain(wanted) in (_plain(has), re.sub(r"-\d+gb$", "", _plain(has)))


def accelerators(catalogue: Catalogue[InstanceType]) -> list[str]:
    """What a person may call them."""
    return sorted({_plain(t.accelerator).upper() for t in catalogue.types.values() if t.accelerator})


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """``Did you mean 'a', 'b'?``, or what there is where nothing is near."""
    names = sorted(known)
    by_lower = {n.lower(): n for n in names}
    near = [by_lower[n] for n in difflib.get_close_matches(name.lower(), by_lower, n=most, cutoff=0.6)]
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    some = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f"There are: {some or 'none'}."


def _plain(accelerator: str) -> str:
    return re.sub(r"^(nvidia-)?(tesla-)?", "", re.sub(r"[ _]+", "-", accelerator.lower()))
