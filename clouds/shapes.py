"""What instance types have, and which of them fit: what the API needs to know of a provider before anything is
launched. The catalogues are the providers' own (``clouds.aws.machines.catalogue``,
``clouds.gcp.machines.catalogue``)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from clouds.contract.retained import RetainedResources
from heliostat.errors import Unavailable

T = TypeVar("T")


class Shape(Protocol):
    """One instance type."""

    @property
    def name(self) -> str: ...

    @property
    def cpu(self) -> int:
        """vCPUs."""
        ...

    @property
    def memory(self) -> int:
        """Bytes."""
        ...

    @property
    def gpu(self) -> int: ...

    @property
    def accelerator(self) -> str:
        """Of its GPUs, as the vendor calls it; "": none."""
        ...

    @property
    def architecture(self) -> str:
        """``x86_64`` or ``arm64``."""
        ...


class Catalogue(Protocol):
    @property
    def types(self) -> Mapping[str, Shape]: ...

    def candidates(
        self,
        cpu: float = 0,
        memory: int | None = None,
        gpu: int = 0,
        accelerator: str = "",
        architecture: str = "x86_64",
    ) -> Sequence[Shape]:
        """What has at least that, best first.

        Args:
            memory: bytes; None: as much as general-purpose types of so many CPUs have.
            accelerator: see :func:`is_accelerator`; "": any.
        """
        ...


@dataclass(frozen=True)
class Offer:
    """What one provider offers, in all of its clouds."""

    catalogue: Catalogue
    check_advanced: Callable[[Mapping[str, Any], RetainedResources | None], None]
    """Raises BadConfig, whose ``field`` is a path within it, for an ``advanced_instance_config`` that a launch would
    refuse, beside what its node keeps."""


def is_accelerator(wanted: str, has: str) -> bool:
    """Whether GPUs that the vendor calls ``has`` are what a person calls ``wanted``: ``T4`` is ``nvidia-tesla-t4``, and
    ``A100`` is ``nvidia-a100-80gb``, too."""
    return _plain(wanted) in (_plain(has), re.sub(r"-\d+gb$", "", _plain(has)))


def own_or_shipped(path: Path, load: Callable[[Path], T], shipped: Callable[[], T], module: str) -> T:
    """The operator's own catalogue where there is one. Raises Unavailable for one that cannot be read.

    Args:
        module: makes it anew.
    """
    if not path.exists():
        return shipped()
    try:
        return load(path)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise Unavailable(
            f"The catalogue of instance types {path} cannot be read: {type(e).__name__}: {e}.",
            remedy=f"Create it again with `python -m {module} refresh`, or remove it.",
            resource=str(path),
        ) from e


def accelerators(catalogue: Catalogue) -> list[str]:
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
